// SPDX-License-Identifier: Apache-2.0
// dump_spirv FILE [options]: compiles a SYCL kernel source with the runtime compiler. With SYCL_DUMP_IMAGES=1 its SPIR-V is
// written before the link, and the link for the CPU device may fail: kernels for a GPU call built-ins that it lacks.
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
    auto object = syclexp::compile(source, syclexp::properties{syclexp::save_log{&log}, syclexp::build_options{options}});
    try {
      (void)sycl::link(object);
    } catch (const sycl::exception&) {
      // As expected of GPU built-ins.
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n" << log << "\n";
    return 1;
  }
}
