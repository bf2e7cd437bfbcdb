/* What cuDNN asks of a driver while it builds a plan, for a machine that has none: a kernel that it compiled is "loaded", and
 * its name printed. Nothing can be launched. */
#include <stdio.h>

typedef void *Any;

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuLibraryLoadData(Any *library, const void *code, Any a, Any b, unsigned n, Any c, Any d, unsigned m)
{ *library = (Any)1; return 0; }
int cuLibraryGetKernel(Any *kernel, Any library, const char *name) { puts(name); *kernel = (Any)1; return 0; }
int cuLibraryUnload(Any library) { return 0; }
int cuKernelGetFunction(Any *function, Any kernel) { *function = (Any)1; return 0; }
int cuKernelSetAttribute(int attribute, int value, Any kernel, int device) { return 0; }

#define NOT_HERE(name) int name(void) { return 100; /* CUDA_ERROR_NO_DEVICE */ }
NOT_HERE(cuCtxGetCurrent) NOT_HERE(cuCtxGetLimit) NOT_HERE(cuCtxPopCurrent) NOT_HERE(cuCtxPushCurrent)
NOT_HERE(cuDeviceGet) NOT_HERE(cuDeviceGetCount) NOT_HERE(cuGetErrorName) NOT_HERE(cuGetErrorString)
NOT_HERE(cuKernelGetAttribute) NOT_HERE(cuLaunchCooperativeKernel) NOT_HERE(cuLaunchKernel) NOT_HERE(cuLaunchKernelEx)
NOT_HERE(cuLibraryLoadFromFile) NOT_HERE(cuLinkAddData) NOT_HERE(cuLinkComplete) NOT_HERE(cuLinkCreate)
NOT_HERE(cuLinkDestroy) NOT_HERE(cuOccupancyMaxPotentialClusterSize) NOT_HERE(cuStreamGetCtx) NOT_HERE(cuInit)
