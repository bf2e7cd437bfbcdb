#include "elementwise.cuh"

namespace bcos::cuda {
BCOS_INSTANTIATE(float);
}
