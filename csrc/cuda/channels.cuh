// Passes over a tensor with per-channel constants or per-channel sums, in both layouts. An operation supplies what
// happens to an element; here is who visits it.
//
//   channels-last: a thread owns V neighbouring columns and walks down the rows (n, h, w), as many of which are taken for
//                  one as make their width a multiple of V;
//   contiguous:    a block owns a channel and walks along the whole V elements of its planes, then along their edges.
//
// V elements are 16 bytes, whatever the sizes, or one where an address is no multiple of 16. Sums take two launches:
// every block writes a partial result, then one small kernel combines them; the partition and the order depend on the
// shape and on V alone, so results are the same bits every time.
#pragma once
#include <numeric>

#include "cuda/bn_act.h"
#include "cuda/device.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/total.cuh"

namespace fastgan::cuda {

constexpr int block_threads = 256;
constexpr int least_blocks = 2;      // on a multiprocessor: leaves the compiler 128 registers, or it spills
constexpr int warps_per_block = block_threads / warp;
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

// Channels-last memory as rows of `width` elements, a multiple of V; `rest` elements follow the last whole one.
struct Rows {
  int64_t count;
  int width, rest, channels;
  int lanes;  // threads of a block side by side along a row
};

// Contiguous memory as planes: of each, `vectors` times V elements lie whole between multiples of V wherever it starts.
struct Planes {
  unsigned count, size, vectors;
  int channels;
};

inline Rows make_rows(BnShape shape, int vector) {
  int channels = static_cast<int>(shape.channels), taken = vector / std::gcd(channels, vector), lanes = 1;
  int64_t rows = shape.n * shape.hw;
  while (lanes < most_lanes && lanes < divide_up(channels * taken, vector)) lanes *= 2;
  return {rows / taken, channels * taken, static_cast<int>(rows % taken) * channels, channels, lanes};
}

inline Planes make_planes(BnShape shape, int vector) {
  auto size = static_cast<unsigned>(shape.hw), before = static_cast<unsigned>(vector - 1);
  unsigned vectors = size % vector == 0 ? size / vector : size < before ? 0 : (size - before) / vector;
  return {static_cast<unsigned>(shape.n), size, vectors, static_cast<int>(shape.channels)};
}

inline dim3 rows_grid(const Rows& rows, int vector) {
  int64_t rows_per_block = int64_t{block_threads / rows.lanes} * in_flight;
  return dim3(divide_up(rows.width, vector * rows.lanes), min(divide_up(rows.count + 1, rows_per_block), most_partials));
}

inline dim3 planes_grid(const Planes& planes, int vector) {
  int64_t values = int64_t{planes.count} * planes.size;
  return dim3(planes.channels, min(divide_up(values, int64_t{vector} * block_threads * in_flight), most_partials));
}

// How many partial results a channel has: channels-last, each of the rows taken for one has its own.
inline int partials_of(BnShape shape, int vector) {
  if (!shape.channels_last) return planes_grid(make_planes(shape, vector), vector).y;
  Rows rows = make_rows(shape, vector);
  return rows_grid(rows, vector).y * (rows.width / rows.channels);
}

// A thread's share of V columns: every so many rows, and of the rest what lies in its columns. use(offset, loaded, i):
// the elements of columns column + i and following.
template <int V, class Operation, class Use>
__device__ __forceinline__ void for_rows(const Operation& operation, const Rows& rows, int column, Use&& use) {
  int depth = block_threads / rows.lanes;
  auto offset = [&](int64_t row) { return row * rows.width + column; };
  pipeline(
      int64_t{blockIdx.y} * depth + threadIdx.x / rows.lanes, rows.count, int64_t{gridDim.y} * depth,
      [&](int64_t row) { return operation.template load<V>(offset(row)); },
      [&](int64_t row, const auto& loaded) { use(offset(row), loaded, 0); });
  if constexpr (V > 1) {
    if (blockIdx.y != 0 || threadIdx.x >= rows.lanes) return;
#pragma unroll
    for (int i = 0; i < V; i++)
      if (column + i < rows.rest) use(offset(rows.count) + i, operation.template load<1>(offset(rows.count) + i), i);
  }
}

// A thread's share of a channel: whole vectors of its planes, then single elements before and after them; the values of a
// channel, n * hw, fit in 31 bits.
template <int V, class Operation, class Use>
__device__ __forceinline__ void for_positions(const Operation& operation, const Planes& planes, int channel, Use&& use) {
  int64_t thread = int64_t{blockIdx.y} * block_threads + threadIdx.x, step = int64_t{gridDim.y} * block_threads;
  auto begin = [&](unsigned plane) { return (int64_t{plane} * planes.channels + channel) * planes.size; };
  auto before = [&](int64_t first) { return static_cast<unsigned>(-first) % V; };  // up to the next multiple of V
  auto vector = [&](int64_t position) {
    unsigned plane = static_cast<unsigned>(position) / planes.vectors;
    int64_t first = begin(plane);
    return first + before(first) + (position - int64_t{plane} * planes.vectors) * V;
  };
  pipeline(
      thread, int64_t{planes.count} * planes.vectors, step,
      [&](int64_t position) { return operation.template load<V>(vector(position)); },
      [&](int64_t position, const auto& loaded) { use(vector(position), loaded); });
  if constexpr (V > 1) {
    unsigned edges = planes.size - planes.vectors * V;
    auto edge = [&](int64_t position) {
      unsigned plane = static_cast<unsigned>(position) / edges, i = static_cast<unsigned>(position) - plane * edges;
      int64_t first = begin(plane);
      return first + (i < before(first) ? i : i + planes.vectors * V);
    };
    pipeline(
        thread, int64_t{planes.count} * edges, step,
        [&](int64_t position) { return operation.template load<1>(edge(position)); },
        [&](int64_t position, const auto& loaded) { use(edge(position), loaded); });
  }
}

// --- elementwise ----------------------------------------------------------------------------------------------------

// Operation: channel(c) gives the constants of a channel, load<V>(offset) the V elements of its inputs there, and
// apply(offset, loaded, constants) stores what becomes of them, where constants(i) is the channel of element i.
template <int V, class Operation>
__global__ void __launch_bounds__(block_threads, least_blocks) map_channels_last(Operation operation, Rows rows) {
  int column = (blockIdx.x * rows.lanes + threadIdx.x % rows.lanes) * V;
  if (column >= rows.width) return;
  typename Operation::Channel constants[V];
#pragma unroll
  for (int i = 0; i < V; i++) constants[i] = operation.channel((column + i) % rows.channels);
  for_rows<V>(operation, rows, column, [&](int64_t offset, const auto& loaded, int first) {
    operation.apply(offset, loaded, [&](int i) { return constants[first + i]; });
  });
}

template <int V, class Operation>
__global__ void __launch_bounds__(block_threads, least_blocks) map_contiguous(Operation operation, Planes planes) {
  typename Operation::Channel constants = operation.channel(blockIdx.x);
  for_positions<V>(operation, planes, blockIdx.x, [&](int64_t offset, const auto& loaded) {
    operation.apply(offset, loaded, [&](int) { return constants; });
  });
}

template <int V, class Operation>
int launch_map(const Operation& operation, BnShape shape, void* stream) {
  if (shape.channels_last) {
    Rows rows = make_rows(shape, V);
    return FASTGAN_LAUNCH((map_channels_last<V, Operation>), rows_grid(rows, V), block_threads, 0, stream, operation, rows);
  }
  Planes planes = make_planes(shape, V);
  return FASTGAN_LAUNCH((map_contiguous<V, Operation>), planes_grid(planes, V), block_threads, 0, stream, operation, planes);
}

// --- sums -----------------------------------------------------------------------------------------------------------

// Operation: channel and load as above; add(loaded, constants, sums) adds element i to sums(i), those of its channel in
// this thread; finish(c, total) stores a channel's result.

template <int V, class Operation>
__global__ void __launch_bounds__(block_threads, least_blocks)
    reduce_channels_last(Operation operation, Rows rows, Total* partials) {
  __shared__ Total of_warp[warps_per_block][most_lanes * V];
  int lane = threadIdx.x % rows.lanes, column = (blockIdx.x * rows.lanes + lane) * V;
  bool inside = column < rows.width;
  Sums running[V];
  if (inside) {
    typename Operation::Channel constants[V];
#pragma unroll
    for (int i = 0; i < V; i++) constants[i] = operation.channel((column + i) % rows.channels);
    for_rows<V>(operation, rows, column, [&](int64_t, const auto& loaded, int first) {
      operation.add(
          loaded, [&](int i) { return constants[first + i]; }, [&](int i) -> Sums& { return running[first + i]; });
    });
  }
  // Combine the rows of a warp, then the warps.
#pragma unroll
  for (int i = 0; i < V; i++) {
    Total total;
    total.add(running[i]);
    for (int bits = warp / 2; bits >= rows.lanes; bits /= 2) total.add_lane(bits);
    if (threadIdx.x % warp < rows.lanes) of_warp[threadIdx.x / warp][lane * V + i] = total;
  }
  __syncthreads();
  if (threadIdx.x < rows.lanes && inside) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      Total total;
      for (int w = 0; w < warps_per_block; w++) total.add(of_warp[w][lane * V + i]);
      partials[int64_t{blockIdx.y} * rows.width + column + i] = total;
    }
  }
}

template <int V, class Operation>
__global__ void __launch_bounds__(block_threads, least_blocks)
    reduce_contiguous(Operation operation, Planes planes, Total* partials) {
  __shared__ Total of_warp[warps_per_block];
  typename Operation::Channel constants = operation.channel(blockIdx.x);
  Sums running;
  for_positions<V>(operation, planes, blockIdx.x, [&](int64_t, const auto& loaded) {
    operation.add(
        loaded, [&](int) { return constants; }, [&](int) -> Sums& { return running; });
  });
  Total of_lanes;
  of_lanes.add(running);
  for (int bits = warp / 2; bits > 0; bits /= 2) of_lanes.add_lane(bits);
  if (threadIdx.x % warp == 0) of_warp[threadIdx.x / warp] = of_lanes;
  __syncthreads();
  if (threadIdx.x == 0) {
    Total total;
    for (int w = 0; w < warps_per_block; w++) total.add(of_warp[w]);
    partials[int64_t{blockIdx.y} * planes.channels + blockIdx.x] = total;
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
  Rows rows = make_rows(shape, V);
  Planes planes = make_planes(shape, V);
  auto* partials = reinterpret_cast<Total*>(workspace);
  int error = shape.channels_last
                  ? FASTGAN_LAUNCH((reduce_channels_last<V, Operation>), rows_grid(rows, V), block_threads, 0, stream, operation,
                                   rows, partials)
                  : FASTGAN_LAUNCH((reduce_contiguous<V, Operation>), planes_grid(planes, V), block_threads, 0, stream, operation,
                                   planes, partials);
  if (error) return error;
  return FASTGAN_LAUNCH((combine_partials<Operation>), divide_up(shape.channels, warp), block_threads, 0, stream, operation,
                        static_cast<int>(shape.channels), partials, partials_of(shape, V));
}

// Whether V elements can be one 16-byte access in tensors at these addresses.
template <class... Tensors>
bool vectors_fit(const Tensors*... tensors) {
  return ((reinterpret_cast<uintptr_t>(tensors) % 16 == 0) && ...);
}

}  // namespace fastgan::cuda
