#include "elementwise.cuh"

namespace bcos::cuda {
BCOS_INSTANTIATE(c10::Half);
}
