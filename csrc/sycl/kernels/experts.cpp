// SPDX-License-Identifier: Apache-2.0
// A layer of experts, beside its products: slots sorted by expert, rows of x brought to their sorted places, the gate between
// the products, and each token's sum of its slots. XPU_FP4_DTYPE is x's, h's and y's.
#include "experts.hpp"

using namespace xpu_fp4;

// One work-group sorts: every lane counts a run of neighbouring slots, so that slots of an expert keep their order. Each
// expert's rows begin a tile (GroupedRows says where).
XPU_FP4_KERNEL(1)
sort_slots(XPU_FP4_ROUTING_PARAMETERS, XPU_FP4_GROUPED_ROWS_PARAMETERS, int64_t slots, int32_t* counts, int32_t* first_tiles) {
  const Routing routing = XPU_FP4_ROUTING;
  const GroupedRows rows = XPU_FP4_GROUPED_ROWS;
  const auto group = syclext::this_work_item::get_work_group<1>();
  const auto lane = static_cast<int64_t>(group.get_local_linear_id());
  const int64_t chunk = ceil_div(slots, int64_t{kSortLanes}), chunks = ceil_div(slots, chunk);
  const int64_t first = sycl::min(lane * chunk, slots), last = sycl::min(first + chunk, slots);

  for (int64_t i = lane; i < chunks * experts; i += kSortLanes) counts[i] = 0;
  for (int64_t i = lane; i < rows.tiles * rows.stride; i += kSortLanes) rows.slot_of_row[i] = -1;
  for (int64_t i = lane; i < rows.tiles; i += kSortLanes) rows.tile[i] = {-1, 0};
  sycl::group_barrier(group);

  for (int64_t slot = first; slot < last; ++slot) {
    const int32_t expert = routing.expert_of(slot);
    if (expert >= 0) ++counts[lane * experts + expert];
  }
  sycl::group_barrier(group);

  int32_t tiles_before = 0;
  for (int64_t base = 0; base < experts; base += kSortLanes) {  // the same for all lanes: they scan together
    const int64_t expert = base + lane;
    int32_t total = 0;
    if (expert < experts) {
      for (int64_t c = 0; c < chunks; ++c) {
        const int32_t own = counts[c * experts + expert];
        counts[c * experts + expert] = total;
        total += own;
      }
    }
    const int32_t own_tiles = ceil_div(total, rows.height);
    const int32_t first_tile = tiles_before + sycl::exclusive_scan_over_group(group, own_tiles, sycl::plus<int32_t>());
    if (expert < experts) first_tiles[expert] = first_tile;
    for (int32_t i = 0; i < own_tiles; ++i) {
      const int32_t height = sycl::min(rows.height, total - i * rows.height);
      rows.tile[first_tile + i] = {static_cast<int32_t>(expert), (first_tile + i) * rows.stride + height};
    }
    tiles_before += sycl::reduce_over_group(group, own_tiles, sycl::plus<int32_t>());
  }
  sycl::group_barrier(group);

  for (int64_t slot = first; slot < last; ++slot) {
    const int32_t expert = routing.expert_of(slot);
    int32_t row = -1;
    if (expert >= 0) {
      const int32_t rank = counts[lane * experts + expert]++;
      row = (first_tiles[expert] + rank / rows.height) * rows.stride + rank % rows.height;
      rows.slot_of_row[row] = static_cast<int32_t>(slot);
    }
    rows.row_of_slot[slot] = row;
  }
}

// Gathers where no fused quantizer reads x: a lane writes an element of its row's token, or 0 where the row is none's.
XPU_FP4_KERNEL(2)
gather_rows(XPU_FP4_TOKENS_PARAMETERS, const int32_t* slot_of_row, void* out, int64_t k) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t row = item.get_global_id(0), i = item.get_global_id(1);
  if (i >= k) return;
  const int32_t slot = slot_of_row[row];
  store_converted<kDType>(out, row * k + i, slot < 0 ? 0.0f : Tokens(XPU_FP4_TOKENS).element<kDType>(slot, i, k));
}

// Computes the gate where no fused quantizer does: u [rows, 2k] -> h [rows, k].
XPU_FP4_KERNEL(2)
gate_rows(const void* u, XPU_FP4_GATE_PARAMETERS, const int32_t* slot_of_row, void* out, int64_t k) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t row = item.get_global_id(0), i = item.get_global_id(1);
  if (i >= k) return;
  float h = 0.0f;
  if (slot_of_row[row] >= 0) {
    const Gate gate = XPU_FP4_GATE;
    h = gate::apply(gate, load_converted<kDType>(u, row * 2 * k + gate.gate_at(i)),
                    load_converted<kDType>(u, row * 2 * k + gate.up_at(i, k)));
  }
  store_converted<kDType>(out, row * k + i, h);
}

// v [rows, n] in float32 -> y [tokens, n], slots in ascending order. No weights: the factor is 1.
XPU_FP4_KERNEL(2)
combine_slots(const float* v, const int32_t* row_of_slot, XPU_FP4_SLOT_WEIGHTS_PARAMETERS, void* y, int64_t n) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t token = item.get_global_id(0), column = item.get_global_id(1);
  if (column >= n) return;
  float acc = 0.0f;
  for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
    const int64_t row = row_of_slot[slot];
    if (row >= 0) acc = sycl::fma(weights == nullptr ? 1.0f : weights[slot], v[row * n + column], acc);
  }
  store_converted<kDType>(y, token * n + column, acc);
}
