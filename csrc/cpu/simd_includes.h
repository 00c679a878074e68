// SPDX-License-Identifier: Apache-2.0
// What the kernels that are compiled for one instruction set use. It comes before a target pragma, because inline functions of
// headers must be compiled for any processor.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../format/accumulate.h"
#include "../format/block.h"
#include "../format/hadamard.h"
#include "../format/mxint8.h"
#include "kernels.h"
#include "panels.h"
#include "prepack.h"

// GCC's AVX-512 intrinsics start from an undefined vector, and GCC 12 warns about it wherever they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
