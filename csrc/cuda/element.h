// The element types of the CUDA kernels, as a run-time value and as a template argument. Free of torch and CUDA.
#pragma once

namespace fastgan::cuda {

enum class Element : int { f32, f16, bf16 };

}  // namespace fastgan::cuda
