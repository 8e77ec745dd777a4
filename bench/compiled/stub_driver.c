/* A stand-in for libcuda.so.1 on which nothing is computed: what Triton calls of the driver, with the
 * checks that a GPU would make of launches and TMA maps, a count of both and a log of what they said.
 * stub_driver.py builds and loads it. */
#include "cuda.h"
#undef cuDevicePrimaryCtxRetain /* Triton looks up the names without a version too */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define CALL __attribute__((visibility("default"))) CUresult
#define MAX_FUNCTIONS 65536
#define MAX_LINE 1024

static int capability = 90, most_shared = 232448;
static FILE *log_file = NULL;
static char names[MAX_FUNCTIONS][128];
static int functions = 0;
static long launches = 0, maps = 0, refused = 0;

static void add(long *count) { __atomic_add_fetch(count, 1, __ATOMIC_RELAXED); }

/* stub_*: for stub_driver.py, not of the driver's interface. */

__attribute__((visibility("default"))) void stub_configure(int cc, int shared, const char *log) {
  capability = cc;
  most_shared = shared;
  log_file = log && *log ? fopen(log, "a") : NULL;
  if (log_file)
    setvbuf(log_file, NULL, _IOLBF, 1 << 16);
}

__attribute__((visibility("default"))) long stub_count(const char *what) {
  long *count = !strcmp(what, "launches") ? &launches : !strcmp(what, "maps") ? &maps : &refused;
  return __atomic_load_n(count, __ATOMIC_RELAXED);
}

/* Text is put together in a line, which is written in one piece: other threads log too. */
typedef struct {
  char text[MAX_LINE];
  int length;
} Line;

static void put(Line *line, const char *format, ...) {
  va_list values;
  va_start(values, format);
  int left = MAX_LINE - line->length;
  int written = vsnprintf(line->text + line->length, left, format, values);
  line->length += written < left ? written : left - 1;
  va_end(values);
}

static void finish(Line *line, const char *why) {
  if (!log_file)
    return;
  put(line, ", \"refused\": \"%s\"}\n", why ? why : "");
  fputs(line->text, log_file);
}

/* The device: one, of the compute capability that was asked for. */

CALL cuInit(unsigned flags) { return CUDA_SUCCESS; }
CALL cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CALL cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CALL cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }

CALL cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch ((int)attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
    *value = capability / 10;
    break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
    *value = capability % 10;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = most_shared;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = 65536;
    break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = 132;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = 32;
    break;
  default: /* clocks and the like, which nothing is chosen by */
    *value = 1000;
  }
  return CUDA_SUCCESS;
}

CALL cuGetErrorString(CUresult error, const char **text) {
  return *text = "refused by the stub of the CUDA driver", CUDA_SUCCESS;
}
CALL cuGetErrorName(CUresult error, const char **text) { return *text = "STUB", CUDA_SUCCESS; }
CALL cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CALL cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CALL cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CALL cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CALL cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CALL cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)1, CUDA_SUCCESS;
}
CALL cuDevicePrimaryCtxRetain_v2(CUcontext *context, CUdevice device) {
  return *context = (CUcontext)1, CUDA_SUCCESS;
}
CALL cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
/* Memory of the host stands for that of the device, at its own address. */
CALL cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  return *(CUdeviceptr *)value = address, CUDA_SUCCESS;
}

/* Kernels: a function is the number of its name. */

CALL cuModuleLoadData(CUmodule *module, const void *image) {
  return *module = (CUmodule)1, CUDA_SUCCESS;
}
CALL cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options,
                        void **values) {
  return *module = (CUmodule)1, CUDA_SUCCESS;
}
CALL cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CALL cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  int number = __atomic_add_fetch(&functions, 1, __ATOMIC_RELAXED);
  if (number >= MAX_FUNCTIONS)
    return CUDA_ERROR_OUT_OF_MEMORY;
  strncpy(names[number], name, sizeof names[number] - 1);
  return *function = (CUfunction)(size_t)number, CUDA_SUCCESS;
}

CALL cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CALL cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
CALL cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CALL cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 1, CUDA_SUCCESS;
}

static const char *launch_fault(const CUlaunchConfig *c) {
  size_t threads = (size_t)c->blockDimX * c->blockDimY * c->blockDimZ;
  if (!c->gridDimX || !c->gridDimY || !c->gridDimZ)
    return "the grid is empty";
  if (c->gridDimX > 2147483647u || c->gridDimY > 65535u || c->gridDimZ > 65535u)
    return "the grid is too large";
  if (threads == 0 || threads > 1024)
    return "the block must have 1 to 1024 threads";
  if (c->sharedMemBytes > (unsigned)most_shared)
    return "more shared memory than a block can have";
  return NULL;
}

CALL cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters,
                      void **extra) {
  const char *why = launch_fault(c);
  add(why ? &refused : &launches);
  if (log_file) {
    Line line = {.length = 0};
    put(&line, "{\"kind\": \"launch\", \"kernel\": \"%s\"", names[(size_t)function]);
    put(&line, ", \"grid\": [%u, %u, %u]", c->gridDimX, c->gridDimY, c->gridDimZ);
    put(&line, ", \"block\": [%u, %u, %u]", c->blockDimX, c->blockDimY, c->blockDimZ);
    put(&line, ", \"shared\": %u, \"stream\": %zu", c->sharedMemBytes, (size_t)c->hStream);
    finish(&line, why);
  }
  return why ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

/* TMA maps: the rules that the documentation of cuTensorMapEncodeTiled gives for maps that are not
 * interleaved. That strides grow from each dimension to the next is no rule: heads lie inside tokens. */

static int bytes_of(CUtensorMapDataType type) {
  static const int bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return (unsigned)type < sizeof bytes / sizeof *bytes ? bytes[type] : 0;
}

static const char *map_fault(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                             void *base, const cuuint64_t *dims, const cuuint64_t *strides,
                             const cuuint32_t *box, const cuuint32_t *steps,
                             CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle) {
  static const unsigned spans[] = {0, 32, 64, 128, 128, 128, 128};
  if ((size_t)map % 64)
    return "64 must divide the address of the map";
  if (!bytes_of(type))
    return "a type that this stub does not know";
  if (rank < 1 || rank > 5)
    return "the rank must be 1 to 5";
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
    return "an interleaved layout, which this stub does not know";
  if ((size_t)base % 16)
    return "16 must divide the address";
  for (cuuint32_t i = 0; i < rank; i++) {
    if (!dims[i] || dims[i] > 1ull << 32)
      return "a dimension must be 1 to 2^32";
    if (!box[i] || box[i] > 256)
      return "a side of the box must be 1 to 256";
    if (!steps[i] || steps[i] > 8)
      return "a step must be 1 to 8";
    /* Of a stride of 0 the documentation says nothing; nobody should depend on it. */
    if (i + 1 < rank && (!strides[i] || strides[i] % 16 || strides[i] >= 1ull << 40))
      return "16 must divide a stride, which must be above 0 and below 2^40";
  }
  unsigned inner = box[0] * bytes_of(type);
  if (inner % 16)
    return "16 must divide the bytes of a row of the box";
  if ((unsigned)swizzle >= sizeof spans / sizeof *spans)
    return "a swizzle that this stub does not know";
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && inner > spans[swizzle])
    return "a row of the box must fit into the swizzle's span";
  return NULL;
}

CALL cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                            const cuuint64_t *dims, const cuuint64_t *strides,
                            const cuuint32_t *box, const cuuint32_t *steps,
                            CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                            CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const char *why =
      map_fault(map, type, rank, base, dims, strides, box, steps, interleave, swizzle);
  add(why ? &refused : &maps);
  if (log_file) {
    cuuint32_t shown = rank > 5 ? 5 : rank;
    Line line = {.length = 0};
    put(&line, "{\"kind\": \"map\", \"bytes\": %d, \"dims\": [", bytes_of(type));
    for (cuuint32_t i = 0; i < shown; i++)
      put(&line, "%s%llu", i ? ", " : "", (unsigned long long)dims[i]);
    put(&line, "], \"strides\": [");
    for (cuuint32_t i = 0; i + 1 < shown; i++)
      put(&line, "%s%llu", i ? ", " : "", (unsigned long long)strides[i]);
    put(&line, "], \"box\": [");
    for (cuuint32_t i = 0; i < shown; i++)
      put(&line, "%s%u", i ? ", " : "", box[i]);
    put(&line, "], \"swizzle\": %d, \"fill\": %d", (int)swizzle, (int)fill);
    finish(&line, why);
  }
  return why ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
