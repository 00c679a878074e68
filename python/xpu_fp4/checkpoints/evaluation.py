# SPDX-License-Identifier: Apache-2.0
"""How far a quantized model is from its original: perplexity, sentence embeddings, and noise layer by layer."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax

from ..modules import MXFP4Linear


@dataclass(frozen=True)
class LayerNoise:
    """Signal-to-noise ratios in decibel, 10 log10(sum of squares / sum of squared differences), against the original layer."""

    name: str
    weight: float
    output: float
    """It is the layer's own: the layer is given the inputs of the original one."""


_ROWS = 128
"""Tokens whose distributions are compared at a time, which bounds the memory: a distribution has an entry for each word."""


@dataclass(frozen=True)
class LanguageScores:
    """How well a model foretells a text and, beside an original, how far its distributions of next tokens are from it."""

    perplexity: float
    divergence: float | None = None
    """Kullback-Leibler divergence of the model from the original, mean over tokens, in nats."""
    agreement: float | None = None
    """Share of tokens for which both hold the same next one for the likeliest."""


def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean cross-entropy of next tokens over windows [W, T] of token ids, each window by itself."""
    return language_scores([model], windows)[0].perplexity


def language_scores(models: Sequence[Any], windows: Tensor, original: Any = None) -> list[LanguageScores]:
    """The scores of each model over windows [W, T] of token ids, each window by itself; the original's come last."""
    everyone = [*models, *([] if original is None else [original])]
    losses: list[list[Tensor]] = [[] for _ in everyone]
    divergences: list[list[Tensor]] = [[] for _ in models]
    agreements: list[list[Tensor]] = [[] for _ in models]
    for window in windows:
        wanted = None if original is None else _logits(original, window)
        for index, model in enumerate(everyone):
            logits = wanted if wanted is not None and index == len(models) else _logits(model, window)
            losses[index].append(cross_entropy(logits.float(), window[1:]).double())
            if wanted is not None and index < len(models):
                divergences[index].append(_divergence(logits, wanted))
                agreements[index].append((logits.argmax(-1) == wanted.argmax(-1)).double().mean())
    scores = []
    for index, loss in enumerate(losses):
        value = math.exp(torch.stack(loss).mean())
        beside = index < len(models) and original is not None
        scores.append(
            LanguageScores(value, _mean(divergences[index]), _mean(agreements[index])) if beside else LanguageScores(value)
        )
    return scores


def _logits(model: Any, window: Tensor) -> Tensor:
    logits: Tensor = model(window[None]).logits[0, :-1]
    return logits


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    sums = [
        kl_div(log_softmax(part.float(), -1), log_softmax(goal.float(), -1), log_target=True, reduction="sum").double()
        for part, goal in zip(logits.split(_ROWS), wanted.split(_ROWS), strict=True)
    ]
    return torch.stack(sums).sum() / len(logits)


def sentence_embeddings(model: Any, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """One vector per sentence [S, H]: the mean of the last hidden states of its tokens."""
    vectors = []
    for sentence in sentences:
        tokens = tokenizer(sentence, return_tensors="pt", truncation=True)
        vectors.append(model(**tokens).last_hidden_state[0].float().mean(0))
    return torch.stack(vectors)


def embedding_similarity(embeddings: Tensor, expected: Tensor) -> Tensor:
    """The cosine of each sentence's angle between two models: [S]."""
    return cosine_similarity(embeddings, expected, dim=-1)


class _Ratio:
    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        expected, actual = expected.double(), actual.double()
        self.signal += float(expected.square().sum())
        self.noise += float((actual - expected).square().sum())

    def decibel(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf


def layer_noise(original: nn.Module, quantized: nn.Module, run: Callable[[nn.Module], object]) -> list[LayerNoise]:
    """The noise of every MXFP4Linear of a model, on the inputs that the original's layer is given in `run(original)`.

    Raises ValueError if the original has no nn.Linear of a quantized layer's name.
    """
    pairs = {name: (_linear(original, name), m) for name, m in quantized.named_modules() if isinstance(m, MXFP4Linear)}
    outputs = {name: _Ratio() for name in pairs}

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: outputs[name].add(output, pairs[name][1](inputs[0]))

    hooks = [linear.register_forward_hook(compare(name)) for name, (linear, _) in pairs.items()]
    try:
        run(original)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        LayerNoise(name, _weight_noise(linear, module), outputs[name].decibel()) for name, (linear, module) in pairs.items()
    ]


def _weight_noise(linear: nn.Linear, module: MXFP4Linear) -> float:
    ratio = _Ratio()
    ratio.add(linear.weight.detach(), module.dequantized_weight())
    return ratio.decibel()


def _linear(model: nn.Module, name: str) -> nn.Linear:
    modules: Iterable[tuple[str, nn.Module]] = model.named_modules()
    found = dict(modules).get(name)
    if not isinstance(found, nn.Linear):
        raise ValueError(f"the original model has no nn.Linear {name}, which the checkpoint quantizes")
    return found
