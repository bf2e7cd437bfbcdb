// What is done on the small maps alone: float, or double beside double tensors.
#include "elementwise.cuh"

namespace bcos::cuda {

int64_t scale_backward_blocks() { return kMaxBlocks; }

template void window_root<float>(const Window&, int64_t, const float*, float*, Stream);
template void window_root<double>(const Window&, int64_t, const double*, double*, Stream);
template void window_spread<float>(const Window&, int64_t, const float*, float*, Stream);
template void window_spread<double>(const Window&, int64_t, const double*, double*, Stream);

}  // namespace bcos::cuda
