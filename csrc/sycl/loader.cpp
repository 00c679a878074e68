// SPDX-License-Identifier: Apache-2.0
// Where the build found SYCL it defines XPU_FP4_SYCL_LIB_DIR (the folder of libsycl.so) and XPU_FP4_SYCL_BACKEND_FILE (the
// backend's file name, beside this library).
#include "loader.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <stdexcept>
#include <vector>

#ifdef XPU_FP4_SYCL_LIB_DIR
#include <sycl/version.hpp>
#define XPU_FP4_STRING_OF(x) #x
#define XPU_FP4_SONAME(major) "libsycl.so." XPU_FP4_STRING_OF(major)
// The backend was linked to this one, so no other version will do.
constexpr char kSyclLibrary[] = XPU_FP4_SONAME(__LIBSYCL_MAJOR_VERSION);
#endif

namespace xpu_fp4::syclrt {
namespace {

namespace fs = std::filesystem;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

void set_unless_set(const char* name, const std::string& value) { setenv(name, value.c_str(), /*overwrite=*/0); }

// The process runs what lies in a cache, so nobody else may write there: a new folder is closed to others, and so becomes one
// that they can only read. Where none can be made, SYCL goes on without.
void make_private(const fs::path& dir) {
  std::error_code ignored;
  fs::create_directories(dir.parent_path(), ignored);
  if (mkdir(dir.c_str(), S_IRWXU) == 0 || errno != EEXIST) return;
  struct stat found{};
  const bool is_ours = stat(dir.c_str(), &found) == 0 && S_ISDIR(found.st_mode) && found.st_uid == geteuid();
  if (!is_ours || (found.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    throw std::runtime_error("xpu_fp4: the kernel cache " + dir.string() +
                             " is not a folder of this user's that others cannot write to: make it yours and run chmod 700 on "
                             "it, or set XPU_FP4_CACHE_DIR to a new folder");
  }
  if ((found.st_mode & (S_IRWXG | S_IRWXO)) != 0) chmod(dir.c_str(), S_IRWXU);
}

std::mutex mutex;
std::string loaded_runtime;

#ifdef XPU_FP4_SYCL_LIB_DIR

fs::path own_folder() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&own_folder), &info);
  return fs::absolute(info.dli_fname).parent_path();
}

std::vector<fs::path> search_folders() {
  if (const auto only = environment("XPU_FP4_SYCL_LIB_DIR"); !only.empty()) return {only};
  std::vector<fs::path> folders;
  if (const auto root = environment("CMPLR_ROOT"); !root.empty()) folders.push_back(fs::path(root) / "lib");
  if (const auto root = environment("ONEAPI_ROOT"); !root.empty()) folders.push_back(fs::path(root) / "compiler/latest/lib");
  // PREFIX/lib/python3.x/site-packages/xpu_fp4 -> PREFIX/lib, where pip puts the runtime
  const fs::path packages = own_folder().parent_path();
  if (packages.filename() == "site-packages" || packages.filename() == "dist-packages") {
    folders.push_back((packages / "../../../lib").lexically_normal());
  }
  folders.emplace_back(XPU_FP4_SYCL_LIB_DIR);
  return folders;
}

std::string path_of(void* library) {
  link_map* map = nullptr;
  return dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 ? map->l_name : "";
}

// The CPU device is found only through this variable when the OpenCL runtime comes from pip.
void offer_cpu_device(const fs::path& folder) {
  if (const fs::path driver = folder / "libintelocl.so"; fs::exists(driver))
    set_unless_set("OCL_ICD_FILENAMES", driver.string());
}

// The files of SYCL's library that the process has mapped, of any version.
std::vector<std::string> mapped_runtimes() {
  std::vector<std::string> files;
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void* found) {
    if (fs::path(info->dlpi_name).filename().string().rfind("libsycl.so", 0) == 0)
      static_cast<std::vector<std::string>*>(found)->emplace_back(info->dlpi_name);
    return 0;
  }, &files);
  return files;
}

// A backend of one version that is handed a queue of another, torch's say, is undefined behaviour.
void refuse_other_runtimes() {
  void* ours = dlopen(kSyclLibrary, RTLD_NOW | RTLD_NOLOAD);
  for (const std::string& file : mapped_runtimes()) {
    if (ours != nullptr && file == path_of(ours)) continue;
    throw std::runtime_error("xpu_fp4: the process has loaded another SYCL runtime, " + file + ", than the " + kSyclLibrary +
                             " that this library was built with (in " XPU_FP4_SYCL_LIB_DIR
                             "). If it is torch's, build xpu_fp4 again with that one: without a oneAPI toolkit's setvars.sh "
                             "and with no other dpcpp-cpp-rt than torch asks for");
  }
}

void load_runtime() {
  refuse_other_runtimes();
  configure_cache();
  const std::string only = environment("XPU_FP4_SYCL_LIB_DIR");
  if (void* library = dlopen(kSyclLibrary, RTLD_NOW | RTLD_NOLOAD)) {
    // A process can have one SYCL runtime only.
    loaded_runtime = path_of(library);
    const fs::path folder = fs::path(loaded_runtime).parent_path();
    std::error_code ignored;
    if (!only.empty() && !fs::equivalent(folder, only, ignored)) {
      throw std::runtime_error("xpu_fp4: XPU_FP4_SYCL_LIB_DIR is " + only + ", but the process has loaded " + loaded_runtime);
    }
    return offer_cpu_device(folder);
  }
  std::string tried;
  for (const fs::path& folder : search_folders()) {
    const fs::path file = folder / kSyclLibrary;
    if (!fs::exists(file)) {
      tried += "\n  " + file.string() + ": no such file";
      continue;
    }
    offer_cpu_device(folder);
    if (dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr) {
      loaded_runtime = file;
      return;
    }
    tried += "\n  " + std::string(dlerror());
  }
  if (only.empty()) {
    if (void* library = dlopen(kSyclLibrary, RTLD_NOW | RTLD_GLOBAL)) {
      loaded_runtime = path_of(library);
      return offer_cpu_device(fs::path(loaded_runtime).parent_path());
    }
    tried += "\n  " + std::string(dlerror());
  }
  throw std::runtime_error("xpu_fp4: no SYCL runtime (" + std::string(kSyclLibrary) +
                           "): install the pip package dpcpp-cpp-rt in the version this library was built with, or a oneAPI "
                           "toolkit (source its setvars.sh). Tried:" +
                           tried);
}

const Plugin* load_backend() {
  load_runtime();
  const fs::path file = own_folder() / XPU_FP4_SYCL_BACKEND_FILE;
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error("xpu_fp4: cannot load the SYCL backend: " + std::string(dlerror()));
  const auto plugin = reinterpret_cast<PluginFunction>(dlsym(library, kPluginSymbol));
  if (plugin == nullptr) throw std::runtime_error("xpu_fp4: " + file.string() + " is not the SYCL backend");
  return plugin();
}

#else

const Plugin* load_backend() {
  throw std::runtime_error(
      "xpu_fp4: built without SYCL: no SYCL headers were found then. Install the pip package dpcpp-cpp-rt==2026.1.2 or a "
      "oneAPI "
      "toolkit (source its setvars.sh), and build again");
}

#endif

}  // namespace

const Plugin& load_plugin() {
  static const Plugin* plugin = nullptr;
  const std::lock_guard lock(mutex);
  if (plugin == nullptr) plugin = load_backend();
  return *plugin;
}

std::string cache_dir() {
  if (const auto dir = environment("SYCL_CACHE_DIR"); !dir.empty()) return dir;
  if (const auto dir = environment("XPU_FP4_CACHE_DIR"); !dir.empty()) return dir;
  if (const auto dir = environment("XDG_CACHE_HOME"); !dir.empty()) return dir + "/xpu_fp4";
  if (const auto home = environment("HOME"); !home.empty()) return home + "/.cache/xpu_fp4";
  return "";
}

void configure_cache() {
  const std::string dir = cache_dir();
  if (dir.empty()) return;
  if (environment("SYCL_CACHE_DIR").empty()) make_private(dir);  // else it is the user's own, or checked already
  set_unless_set("SYCL_CACHE_PERSISTENT", "1");
  set_unless_set("SYCL_CACHE_DIR", dir);
}

std::string runtime_path() {
  const std::lock_guard lock(mutex);
  return loaded_runtime;
}

}  // namespace xpu_fp4::syclrt
