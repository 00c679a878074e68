// SPDX-License-Identifier: Apache-2.0
// The MX formats that an operand may have, and what a product must know of each. Host and device.
#pragma once
#include <cstdint>

namespace xpu_fp4 {

/// none: floats as they are. mxfp4: e2m1 codes, two to a byte (format/e2m1.h). mxint8: signed bytes (format/mxint8.h).
enum class Format : int { none = 0, mxfp4 = 1, mxint8 = 2 };

/// MXINT8's group by default: four neighbouring blocks share a scale, so that a quad of a product does.
constexpr int kDefaultGroup = 128;

/// Bytes of the codes of k elements.
constexpr int64_t code_bytes(Format format, int64_t k) { return format == Format::mxfp4 ? k / 2 : k; }

/// Products multiply integers: an element is its integer times 2^integer_exponent. Twice an e2m1 value is an integer up to 12;
/// an int8 element is a code up to 128 times 2^-6 (OCP Microscaling Formats v1.0, 5.3.4).
constexpr int integer_exponent(Format format) { return format == Format::mxint8 ? -6 : -1; }
constexpr int largest_integer(Format format) { return format == Format::mxint8 ? 128 : 12; }

}  // namespace xpu_fp4
