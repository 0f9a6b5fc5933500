// Passes over a tensor with per-channel constants or per-channel sums, in both layouts. An operation supplies what
// happens to an element; here is who visits it.
//
//   channels-last: a thread owns V neighbouring channels and walks down the rows (n, h, w);
//   contiguous:    a block owns a channel and walks along its positions, V at a time.
//
// V elements are 16 bytes, or one where addresses or sizes do not allow that. Sums take two launches: every block writes
// a partial result, then one small kernel combines them; the partition and the order depend on the shape alone, so
// results are the same bits every time.
#pragma once
#include "cuda/bn_act.h"
#include "cuda/device.cuh"
#include "cuda/total.cuh"

namespace fastgan::cuda {

constexpr int block_threads = 256;
constexpr int warps_per_block = block_threads / warp;
constexpr int in_flight = 4;        // loads under way in a thread
constexpr int most_lanes = 16;      // threads side by side along the channels, channels-last
constexpr int most_partials = 256;  // blocks that share a channel

// V elements as loaded, still in their own type.
template <int V, class T>
struct Elements {
  std::conditional_t<V == 1, T, Vector<T>> raw;
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (V == 1) return to_float(raw);
    else return to_float(raw.v[i]);
  }
};

template <int V, class T>
__device__ __forceinline__ Elements<V, T> read(const T* p) {
  if constexpr (V == 1) return {*p};
  else return {load_vector(p)};
}

template <int V, class T>
__device__ __forceinline__ void write(T* p, const float (&in)[V]) {
  if constexpr (V == 1) {
    *p = from_float<T>(in[0]);
  } else {
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < V; i++) vector.v[i] = from_float<T>(in[i]);
    store_vector(p, vector);
  }
}

// --- where a block works --------------------------------------------------------------------------------------------

struct Grid {
  int lanes = 0;  // channels-last: threads side by side
  unsigned x = 0, y = 0;
  int partials() const { return static_cast<int>(y); }
};

inline Grid make_grid(BnShape shape, int vector) {
  Grid grid;
  if (shape.channels_last) {
    int64_t vectors = divide_up(shape.channels, vector);
    grid.lanes = 1;
    while (grid.lanes < most_lanes && grid.lanes < vectors) grid.lanes *= 2;
    grid.x = divide_up(vectors, grid.lanes);
    int64_t rows_per_block = int64_t{block_threads / grid.lanes} * in_flight;
    grid.y = min(divide_up(shape.n * shape.hw, rows_per_block), most_partials);
  } else {
    grid.x = static_cast<unsigned>(shape.channels);
    grid.y = min(divide_up(divide_up(shape.n * shape.hw, vector), block_threads * in_flight), most_partials);
  }
  return grid;
}

// Visits `first`, `first + step`, ... below `end`: loads several before it uses the first, to keep them in flight.
template <class Load, class Use>
__device__ __forceinline__ void pipeline(int64_t first, int64_t end, int64_t step, Load&& load, Use&& use) {
  int64_t i = first;
  for (; i + (in_flight - 1) * step < end; i += in_flight * step) {
    decltype(load(i)) loaded[in_flight];
#pragma unroll
    for (int k = 0; k < in_flight; k++) loaded[k] = load(i + k * step);
#pragma unroll
    for (int k = 0; k < in_flight; k++) use(i + k * step, loaded[k]);
  }
  for (; i < end; i += step) use(i, load(i));
}

// A thread's share of V channels, channels-last: every so many rows.
template <int V, class Operation, class Use>
__device__ __forceinline__ void for_rows(const Operation& operation, int64_t rows, int64_t channels, int channel, int lanes,
                                         Use&& use) {
  int depth = block_threads / lanes;
  auto offset = [&](int64_t row) { return row * channels + channel; };
  pipeline(
      int64_t{blockIdx.y} * depth + threadIdx.x / lanes, rows, int64_t{gridDim.y} * depth,
      [&](int64_t row) { return operation.template load<V>(offset(row)); },
      [&](int64_t row, const auto& loaded) { use(offset(row), loaded); });
}

// A thread's share of a channel, contiguous: positions in its n planes of hw elements; n * hw fits in 31 bits.
template <int V, class Operation, class Use>
__device__ __forceinline__ void for_positions(const Operation& operation, unsigned n, unsigned hw, int64_t channels,
                                              int channel, Use&& use) {
  unsigned per_plane = hw / V;
  auto offset = [&](int64_t position) {
    unsigned plane = static_cast<unsigned>(position) / per_plane;
    return (plane * channels + channel) * hw + (position - int64_t{plane} * per_plane) * V;
  };
  pipeline(
      int64_t{blockIdx.y} * block_threads + threadIdx.x, int64_t{n} * per_plane, int64_t{gridDim.y} * block_threads,
      [&](int64_t position) { return operation.template load<V>(offset(position)); },
      [&](int64_t position, const auto& loaded) { use(offset(position), loaded); });
}

// --- elementwise ----------------------------------------------------------------------------------------------------

// Operation: channel(c) gives the constants of a channel, load<V>(offset) the V elements of its inputs there, and
// apply<V>(offset, loaded, constants) stores what becomes of them, where constants(i) is the channel of element i.
template <int V, class Operation>
__global__ void __launch_bounds__(block_threads, 2) map_channels_last(Operation operation, int64_t rows, int channels, int lanes) {
  int channel = (blockIdx.x * lanes + threadIdx.x % lanes) * V;
  if (channel >= channels) return;
  typename Operation::Channel constants[V];
#pragma unroll
  for (int i = 0; i < V; i++) constants[i] = operation.channel(channel + i);
  for_rows<V>(operation, rows, channels, channel, lanes, [&](int64_t offset, const auto& loaded) {
    operation.template apply<V>(offset, loaded, [&](int i) { return constants[i]; });
  });
}

template <int V, class Operation>
__global__ void __launch_bounds__(block_threads, 2) map_contiguous(Operation operation, unsigned n, unsigned hw, int channels) {
  typename Operation::Channel constants = operation.channel(blockIdx.x);
  for_positions<V>(operation, n, hw, channels, blockIdx.x, [&](int64_t offset, const auto& loaded) {
    operation.template apply<V>(offset, loaded, [&](int) { return constants; });
  });
}

template <int V, class Operation>
int launch_map(const Operation& operation, BnShape shape, void* stream) {
  Grid grid = make_grid(shape, V);
  if (shape.channels_last)
    return FASTGAN_LAUNCH((map_channels_last<V, Operation>), dim3(grid.x, grid.y), block_threads, 0, stream, operation,
                          shape.n * shape.hw, static_cast<int>(shape.channels), grid.lanes);
  return FASTGAN_LAUNCH((map_contiguous<V, Operation>), dim3(grid.x, grid.y), block_threads, 0, stream, operation,
                        static_cast<unsigned>(shape.n), static_cast<unsigned>(shape.hw), static_cast<int>(shape.channels));
}

// --- sums -----------------------------------------------------------------------------------------------------------

// Operation: channel and load as above; add<V>(loaded, constants, sums) adds element i to sums(i), those of its channel in
// this thread; finish(c, total) stores a channel's result.

template <int V, class Operation>
__global__ void __launch_bounds__(block_threads)
    reduce_channels_last(Operation operation, int64_t rows, int channels, int lanes, Total* partials) {
  __shared__ Total of_warp[warps_per_block][most_lanes * V];
  int lane = threadIdx.x % lanes, channel = (blockIdx.x * lanes + lane) * V;
  bool inside = channel < channels;
  Sums running[V];
  if (inside) {
    typename Operation::Channel constants[V];
#pragma unroll
    for (int i = 0; i < V; i++) constants[i] = operation.channel(channel + i);
    for_rows<V>(operation, rows, channels, channel, lanes, [&](int64_t, const auto& loaded) {
      operation.template add<V>(
          loaded, [&](int i) { return constants[i]; }, [&](int i) -> auto& { return running[i]; });
    });
  }
  // Combine the rows of a warp, then the warps.
#pragma unroll
  for (int i = 0; i < V; i++) {
    Total total;
    total.add(running[i]);
    for (int bits = warp / 2; bits >= lanes; bits /= 2) total.add_lane(bits);
    if (threadIdx.x % warp < lanes) of_warp[threadIdx.x / warp][lane * V + i] = total;
  }
  __syncthreads();
  if (threadIdx.x < lanes && inside) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      Total total;
      for (int w = 0; w < warps_per_block; w++) total.add(of_warp[w][lane * V + i]);
      partials[int64_t{blockIdx.y} * channels + channel + i] = total;
    }
  }
}

template <int V, class Operation>
__global__ void __launch_bounds__(block_threads)
    reduce_contiguous(Operation operation, unsigned n, unsigned hw, int channels, Total* partials) {
  __shared__ Total of_warp[warps_per_block];
  typename Operation::Channel constants = operation.channel(blockIdx.x);
  Sums running;
  for_positions<V>(operation, n, hw, channels, blockIdx.x, [&](int64_t, const auto& loaded) {
    operation.template add<V>(
        loaded, [&](int) { return constants; }, [&](int) -> auto& { return running; });
  });
  Total of_lanes;
  of_lanes.add(running);
  for (int bits = warp / 2; bits > 0; bits /= 2) of_lanes.add_lane(bits);
  if (threadIdx.x % warp == 0) of_warp[threadIdx.x / warp] = of_lanes;
  __syncthreads();
  if (threadIdx.x == 0) {
    Total total;
    for (int w = 0; w < warps_per_block; w++) total.add(of_warp[w]);
    partials[int64_t{blockIdx.y} * channels + blockIdx.x] = total;
  }
}

// A warp's width of channels, warps_per_block threads deep.
template <class Operation>
__global__ void __launch_bounds__(block_threads)
    combine_partials(Operation operation, int channels, const Total* partials, int count) {
  __shared__ Total of_warp[warps_per_block][warp];
  int lane = threadIdx.x % warp, depth = threadIdx.x / warp, channel = blockIdx.x * warp + lane;
  Total share, total;
  if (channel < channels)
    for (int p = depth; p < count; p += warps_per_block) share.add(partials[int64_t{p} * channels + channel]);
  of_warp[depth][lane] = share;
  __syncthreads();
  if (depth == 0 && channel < channels) {
    for (int d = 0; d < warps_per_block; d++) total.add(of_warp[d][lane]);
    operation.finish(channel, total);
  }
}

template <int V, class Operation>
int launch_reduce(const Operation& operation, BnShape shape, float* workspace, void* stream) {
  Grid grid = make_grid(shape, V);
  int channels = static_cast<int>(shape.channels);
  auto* partials = reinterpret_cast<Total*>(workspace);
  int error = shape.channels_last
                  ? FASTGAN_LAUNCH((reduce_channels_last<V, Operation>), dim3(grid.x, grid.y), block_threads, 0, stream,
                                   operation, shape.n * shape.hw, channels, grid.lanes, partials)
                  : FASTGAN_LAUNCH((reduce_contiguous<V, Operation>), dim3(grid.x, grid.y), block_threads, 0, stream,
                                   operation, static_cast<unsigned>(shape.n), static_cast<unsigned>(shape.hw), channels, partials);
  if (error) return error;
  return FASTGAN_LAUNCH((combine_partials<Operation>), divide_up(channels, warp), block_threads, 0, stream, operation,
                        channels, partials, grid.partials());
}

// Whether V elements can be one 16-byte access in this shape, for tensors at these addresses.
template <class T, class... Tensors>
bool vectors_fit(BnShape shape, const Tensors*... tensors) {
  int64_t inner = shape.channels_last ? shape.channels : shape.hw;
  return inner % Vector<T>::size == 0 && ((reinterpret_cast<uintptr_t>(tensors) % 16 == 0) && ...);
}

}  // namespace fastgan::cuda
