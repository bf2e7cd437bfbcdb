// The CUDA runtime's own name for a stream, so that what only passes one on needs none of CUDA's headers.
#pragma once

struct CUstream_st;

namespace bcos::cuda {
using Stream = CUstream_st*;
}
