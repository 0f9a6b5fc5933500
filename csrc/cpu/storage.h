// What kernels that compute in float or double read and write.
#pragma once

namespace fastgan::cpu {

enum class Storage { float32, float64, bfloat16 };

}  // namespace fastgan::cpu
