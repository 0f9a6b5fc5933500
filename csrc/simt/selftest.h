#pragma once
#include <functional>
#include <map>
#include <string>

namespace fastgan::simt_selftest {

// y has 128 ints, of which the second half counts as unwritten when the kernel's name says so.
using Launcher = std::function<void(int* y, bool broken)>;
const std::map<std::string, Launcher>& kernels();

}  // namespace fastgan::simt_selftest
