// SPDX-License-Identifier: Apache-2.0
#include "spirv.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <string_view>
#include <unordered_map>

#include "device_sources.h"
#include "programs.h"

// A pack of csrc/sycl/spirv.py's.
extern "C" const std::byte xpu_fp4_spirv_begin[], xpu_fp4_spirv_end[];

namespace xpu_fp4::syclrt {
namespace {

class Fnv1a {
 public:
  void add(std::string_view text) {
    for (const char c : text) add_byte(static_cast<uint8_t>(c));
    add_byte(0);  // where one text ends and the next begins counts
  }
  uint64_t value() const { return hash_; }

 private:
  void add_byte(uint8_t byte) { hash_ = (hash_ ^ byte) * 0x100000001B3; }

  uint64_t hash_ = 0xCBF29CE484222325;
};

// The file and all that it includes, except system headers.
void add_with_includes(const std::string& name, std::set<std::string>& files) {
  const auto source = std::find_if(kDeviceSources.begin(), kDeviceSources.end(), [&](const auto& s) {
    return s.name == name || s.name == "format/" + name;  // headers of format/ include each other by their own name
  });
  if (source == kDeviceSources.end() || !files.insert(source->name).second) return;
  constexpr std::string_view directive = "#include \"";
  const std::string& text = source->text;
  for (size_t at = text.find(directive); at != std::string::npos; at = text.find(directive, at)) {
    at += directive.size();
    add_with_includes(text.substr(at, text.find('"', at) - at), files);
  }
}

std::unordered_map<uint64_t, Spirv> read_pack() {
  std::unordered_map<uint64_t, Spirv> programs;
  const std::byte* at = xpu_fp4_spirv_begin;
  while (at != xpu_fp4_spirv_end) {
    uint64_t header[2];  // key, size
    std::memcpy(header, at, sizeof header);
    at += sizeof header;
    programs.emplace(header[0], Spirv{at, static_cast<size_t>(header[1])});
    at += (header[1] + 7) / 8 * 8;
  }
  return programs;
}

const std::unordered_map<uint64_t, Spirv>& embedded() {
  static const auto& programs = *new std::unordered_map(read_pack());
  return programs;
}

}  // namespace

uint64_t program_key(const Variant& variant) {
  std::set<std::string> files;
  add_with_includes(variant.file, files);
  Fnv1a hash;
  for (const DeviceSource& source : kDeviceSources) {
    if (files.count(source.name) == 0) continue;
    hash.add(source.name);
    hash.add(source.text);
  }
  hash.add(variant.file);
  for (const std::string& option : build_options(variant)) hash.add(option);
  return hash.value();
}

std::optional<Spirv> embedded_spirv(uint64_t key) {
  const auto found = embedded().find(key);
  return found == embedded().end() ? std::nullopt : std::optional(found->second);
}

size_t embedded_count() { return embedded().size(); }

}  // namespace xpu_fp4::syclrt
