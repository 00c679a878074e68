// SPDX-License-Identifier: Apache-2.0
// dump_spirv FILE [options]: compiles a SYCL kernel source with the runtime compiler, which with SYCL_DUMP_IMAGES=1 writes its
// SPIR-V. Nothing is linked: kernels for a GPU call built-ins that the CPU device lacks.
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <sycl/sycl.hpp>
#include <vector>

namespace syclexp = sycl::ext::oneapi::experimental;

int main(int argc, char** argv) {
  std::ostringstream text;
  text << std::ifstream(argv[1]).rdbuf();
  const std::vector<std::string> options(argv + 2, argv + argc);
  std::string log;
  try {
    sycl::queue queue;
    auto source = syclexp::create_kernel_bundle_from_source(queue.get_context(), syclexp::source_language::sycl, text.str());
    (void)syclexp::compile(source, syclexp::properties{syclexp::save_log{&log}, syclexp::build_options{options}});
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n" << log << "\n";
    return 1;
  }
}
