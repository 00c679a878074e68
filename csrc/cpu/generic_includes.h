// SPDX-License-Identifier: Apache-2.0
// What generic_kernels.h uses. A file of its own, to be included before a target pragma.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../format/accumulate.h"
#include "../format/block.h"
#include "kernels.h"
