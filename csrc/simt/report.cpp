// Collects what the checkers find, once per kind and place, with source lines from the debug information.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>

#include "simt/runtime.h"

namespace simt {
namespace {

std::vector<Report> reports;
std::map<std::tuple<std::string, std::string, std::string>, size_t> places;  // kind, kernel, source lines

std::string file_name(const std::string& path) {
  size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

// "device.cuh:31, bn_act.cu:120": the line of the access and the lines it was inlined from.
std::string source_lines(const void* pc) {
  static std::map<const void*, std::string> known;
  if (auto found = known.find(pc); found != known.end()) return found->second;
  Dl_info info;
  if (!dladdr(pc, &info)) return "?";
  char command[512];
  auto offset = static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1;
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' %#lx 2>/dev/null", info.dli_fname, static_cast<unsigned long>(offset));
  std::string lines;
  if (FILE* pipe = popen(command, "r")) {
    char line[512];
    while (std::fgets(line, sizeof line, pipe)) {
      std::string text = file_name(std::string(line, std::strcspn(line, " \n")));
      lines += (lines.empty() ? "" : ", ") + text;
    }
    pclose(pipe);
  }
  return known[pc] = lines.empty() ? "?" : lines;
}

void add(const char* kind, std::string message, std::string where) {
  auto [place, fresh] = places.try_emplace({kind, kernel_name(), where}, reports.size());
  if (fresh) reports.push_back({kind, std::move(message), kernel_name(), where, self->block, self->index, 0});
  reports[place->second].count++;
}

}  // namespace

void report(const char* kind, std::string message, const void* pc) {
  add(kind, std::move(message), source_lines(pc));
}

void report(const char* kind, std::string message, Site site) {
  add(kind, std::move(message), file_name(site.file_name()) + ":" + std::to_string(site.line()));
}

std::vector<Report> take_reports() {
  places.clear();
  return std::exchange(reports, {});
}

}  // namespace simt
