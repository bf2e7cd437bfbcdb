// The dtypes of the CPU kernels.
#pragma once

#include <ATen/Dispatch.h>

// Runs the lambda with `scalar_t`.
#define BCOS_DISPATCH(TYPE, NAME, ...) AT_DISPATCH_FLOATING_TYPES_AND(at::ScalarType::BFloat16, TYPE, NAME, __VA_ARGS__)
