// SPDX-License-Identifier: Apache-2.0
#include "loader.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <vector>

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
std::string loaded_runtime, loaded_backend;

fs::path own_folder() {
  Dl_info info;
  dladdr(reinterpret_cast<void*>(&own_folder), &info);
  return fs::absolute(info.dli_fname).parent_path();
}

/// A SYCL backend, and the runtime that it was linked to: no other version will do.
struct BackendFile {
  int major;
  fs::path file;

  std::string runtime() const { return "libsycl.so." + std::to_string(major); }
};

// Lists those that were built, the newest first: _sycl_backend_9.abi3.so, of CMake _sycl_backend_9.so. One without a number is
// a leftover of builds that had a single backend.
std::vector<BackendFile> backend_files() {
  constexpr std::string_view kPrefix = "_sycl_backend_";
  std::vector<BackendFile> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(own_folder())) {
    const std::string name = entry.path().filename().string();
    if (name.rfind(kPrefix, 0) != 0 || entry.path().extension() != ".so") continue;
    if (const int major = std::atoi(name.c_str() + kPrefix.size()); major > 0) files.push_back({major, entry.path()});
  }
  std::sort(files.begin(), files.end(), [](const auto& a, const auto& b) { return a.major > b.major; });
  return files;
}

// Lists the files that the process has mapped whose name begins so.
std::vector<fs::path> mapped_files(std::string_view prefix) {
  struct Search {
    std::string_view prefix;
    std::vector<fs::path> files;
  } search{prefix, {}};
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void* data) {
    auto& [prefix, files] = *static_cast<Search*>(data);
    if (const fs::path file = info->dlpi_name; file.filename().string().rfind(prefix, 0) == 0) files.push_back(file);
    return 0;
  }, &search);
  return search.files;
}

// PREFIX/lib/python3.x/site-packages -> PREFIX/lib, where pip puts the runtime
void add_environment(const fs::path& packages, std::vector<fs::path>& folders) {
  if (packages.filename() != "site-packages" && packages.filename() != "dist-packages") return;
  folders.push_back((packages / "../../../lib").lexically_normal());
}

std::vector<fs::path> search_folders() {
  if (const auto only = environment("XPU_FP4_SYCL_LIB_DIR"); !only.empty()) return {only};
  std::vector<fs::path> folders;
  if (const auto root = environment("CMPLR_ROOT"); !root.empty()) folders.push_back(fs::path(root) / "lib");
  if (const auto root = environment("ONEAPI_ROOT"); !root.empty()) folders.push_back(fs::path(root) / "compiler/latest/lib");
  add_environment(own_folder().parent_path(), folders);
  for (const fs::path& torch : mapped_files("libc10.so")) {  // site-packages/torch/lib
    add_environment(torch.parent_path().parent_path().parent_path(), folders);
    folders.push_back(torch.parent_path());
  }
  return folders;
}

std::string path_of(void* library) {
  link_map* map = nullptr;
  return dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 ? map->l_name : "";
}

void* loaded(const std::string& library) { return dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD); }

// The CPU device is found only through this variable when the OpenCL runtime comes from pip.
void offer_cpu_device(const fs::path& folder) {
  if (const fs::path driver = folder / "libintelocl.so"; fs::exists(driver))
    set_unless_set("OCL_ICD_FILENAMES", driver.string());
}

void set_runtime(const fs::path& file) {
  loaded_runtime = file;
  offer_cpu_device(file.parent_path());
}

std::string runtimes(const std::vector<BackendFile>& backends) {
  std::string names;
  for (const BackendFile& backend : backends) names += (names.empty() ? "" : " or ") + backend.runtime();
  return names;
}

// A process can have one SYCL runtime only: a backend of one version that is handed a queue of another, torch's say, is
// undefined behaviour. Gives the backend for the runtime that is there; throws where none is.
const BackendFile& backend_of_process(const std::vector<BackendFile>& backends, const std::vector<fs::path>& mapped) {
  const auto found =
      std::find_if(backends.begin(), backends.end(), [](const auto& backend) { return loaded(backend.runtime()) != nullptr; });
  const std::string ours = found == backends.end() ? "" : path_of(loaded(found->runtime()));
  for (const fs::path& file : mapped) {
    if (file == ours) continue;
    throw std::runtime_error("xpu_fp4: the process has loaded another SYCL runtime, " + file.string() + ", than the " +
                             runtimes(backends) +
                             " that this library was built with. If it is torch's, build xpu_fp4 again with that one: "
                             "without a oneAPI toolkit's setvars.sh and with no other dpcpp-cpp-rt than torch asks for");
  }
  set_runtime(ours);
  const std::string only = environment("XPU_FP4_SYCL_LIB_DIR");
  std::error_code ignored;
  if (!only.empty() && !fs::equivalent(fs::path(ours).parent_path(), only, ignored)) {
    throw std::runtime_error("xpu_fp4: XPU_FP4_SYCL_LIB_DIR is " + only + ", but the process has loaded " + ours);
  }
  return *found;
}

// Loads the runtime of a backend, and gives that backend.
const BackendFile& load_runtime(const std::vector<BackendFile>& backends) {
  configure_cache();
  if (const auto mapped = mapped_files("libsycl.so"); !mapped.empty()) return backend_of_process(backends, mapped);
  std::string tried;
  for (const fs::path& folder : search_folders()) {
    for (const BackendFile& backend : backends) {
      const fs::path file = folder / backend.runtime();
      if (!fs::exists(file)) {
        tried += "\n  " + file.string() + ": no such file";
        continue;
      }
      offer_cpu_device(folder);
      if (dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr) {
        set_runtime(file);
        return backend;
      }
      tried += "\n  " + std::string(dlerror());
    }
  }
  for (const BackendFile& backend : backends) {
    if (!environment("XPU_FP4_SYCL_LIB_DIR").empty()) break;
    // It knows the folder that it was built with, and the system its own.
    if (dlopen(backend.file.c_str(), RTLD_NOW | RTLD_LOCAL) != nullptr) {
      set_runtime(path_of(loaded(backend.runtime())));
      return backend;
    }
    tried += "\n  " + std::string(dlerror());
  }
  throw std::runtime_error("xpu_fp4: no SYCL runtime (" + runtimes(backends) +
                           "): install the pip package dpcpp-cpp-rt in the version this library was built with, or a oneAPI "
                           "toolkit (source its setvars.sh). Tried:" +
                           tried);
}

const Plugin* load_backend() {
  const std::vector<BackendFile> backends = backend_files();
  if (backends.empty()) {
    throw std::runtime_error(
        "xpu_fp4: built without SYCL: no SYCL headers were found then. Install the pip package dpcpp-cpp-rt==2026.1.2 or a "
        "oneAPI toolkit (source its setvars.sh), and build again");
  }
  const BackendFile& backend = load_runtime(backends);
  const auto plugin = reinterpret_cast<PluginFunction>(load_beside(backend.file.filename(), kPluginSymbol));
  loaded_backend = backend.file;
  return plugin();
}

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

std::string backend_path() {
  const std::lock_guard lock(mutex);
  return loaded_backend;
}

void* load_beside(const std::string& file, const char* symbol) {
  const fs::path path = own_folder() / file;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error("xpu_fp4: cannot load " + file + ": " + dlerror());
  void* found = dlsym(library, symbol);
  if (found == nullptr) throw std::runtime_error("xpu_fp4: " + path.string() + " has no " + symbol);
  return found;
}

}  // namespace xpu_fp4::syclrt
