# SPDX-License-Identifier: Apache-2.0
"""The benchmark behind `xpu-fp4 bench`: our ops, their peers and the machine's limits in one run and in alternation.

`cases` says what is measured, `contenders`, `peers` and `limits` who takes part, `measure` how; `runner` collects a record, and
`report`, `targets` and `plots` read one.
"""
