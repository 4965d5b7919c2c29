// A libcuda without a GPU: the calls that nybble makes, with kernels that run on the CPU.
//
// "Device" memory is host memory. Launches run the kernels of the emulator library that
// NYBBLE_EMULATOR names, at once. What the driver would refuse is refused: a launch without the
// context of the kernel's device, an unknown kernel, grids and blocks that are too large.
//
//   NYBBLE_FAKE_DEVICES     number of devices (1)
//   NYBBLE_FAKE_VERSION     CUDA version (12040)
//   NYBBLE_FAKE_CAPABILITY  compute capability of every device (90)
//   NYBBLE_FAKE_MULTIPROCESSORS  of every device (132)
//   NYBBLE_FAKE_CAPTURING   a stream that is being captured
//   NYBBLE_FAKE_FAIL        results of calls: "cuLaunchKernel:719,cuInit:999"
//   NYBBLE_FAKE_EXIT        kernels whose launch ends the process, with commas between them
//   NYBBLE_FAKE_REFUSE      images that are refused: "cubin", "ptx" or both
//   NYBBLE_FAKE_LOG         a file that gets a line for each load and launch
//
// Compiled with -DWITHOUT_CAPTURING it lacks cuStreamIsCapturing, as a stub does.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <mutex>
#include <string>
#include <unistd.h>

namespace {

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY = 209,
    UNSUPPORTED_PTX = 222,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
};

int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

std::string text(const char *name) {
    const char *text = getenv(name);
    return text ? text : "";
}

// The result that was asked for, for a call; 0 if none was.
int injected(const char *call) {
    std::string all = "," + text("NYBBLE_FAKE_FAIL");
    size_t at = all.find("," + std::string(call) + ":");
    return at == std::string::npos ? 0 : atoi(all.c_str() + at + strlen(call) + 2);
}

#define INJECT(call)                                                                               \
    if (int result = injected(call))                                                               \
    return result

void log_line(const std::string &line) {
    std::string path = text("NYBBLE_FAKE_LOG");
    if (path.empty())
        return;
    if (FILE *file = fopen(path.c_str(), "a")) {
        fprintf(file, "%s\n", line.c_str());
        fclose(file);
    }
}

struct Emulator {
    int (*knows)(const char *);
    int (*run)(const char *, const unsigned[3], const unsigned[3], unsigned, const void *);
};

const Emulator &emulator() {
    static Emulator found = [] {
        void *library = dlopen(text("NYBBLE_EMULATOR").c_str(), RTLD_NOW);
        if (!library) {
            fprintf(stderr, "fake libcuda: %s\n", dlerror());
            exit(70);
        }
        Emulator emulator;
        *(void **)&emulator.knows = dlsym(library, "nybble_emulated");
        *(void **)&emulator.run = dlsym(library, "nybble_emulate");
        return emulator;
    }();
    return found;
}

// Handles. A context, a module and the kernels of a module belong to a device.
struct Context {
    int device;
} contexts[8] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};
struct Kernel {
    Context *context;
    std::string name;
    unsigned shared_most; // bytes that a launch may ask for
};
constexpr unsigned SHARED = 48 << 10, SHARED_AT_MOST = 64 << 10; // by itself, and on devices of 7.5

bool initialized = false;
thread_local Context *current = nullptr;
std::mutex emulating; // shared memory of the emulated kernels is static

} // namespace

extern "C" {

int cuInit(unsigned) {
    INJECT("cuInit");
    if (number("NYBBLE_FAKE_DEVICES", 1) == 0)
        return NO_DEVICE;
    initialized = true;
    return SUCCESS;
}

int cuDriverGetVersion(int *version) {
    *version = number("NYBBLE_FAKE_VERSION", 12040);
    return SUCCESS;
}

int cuDeviceGetCount(int *count) {
    *count = number("NYBBLE_FAKE_DEVICES", 1);
    return initialized ? SUCCESS : NOT_INITIALIZED;
}

int cuDeviceGet(int *device, int ordinal) {
    if (ordinal < 0 || ordinal >= number("NYBBLE_FAKE_DEVICES", 1) || ordinal >= 8)
        return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

int cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, size, "Emulated device %d", device);
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int) {
    int capability = number("NYBBLE_FAKE_CAPABILITY", 90);
    if (attribute == 75) // COMPUTE_CAPABILITY_MAJOR
        *value = capability / 10;
    else if (attribute == 76) // COMPUTE_CAPABILITY_MINOR
        *value = capability % 10;
    else if (attribute == 16) // MULTIPROCESSOR_COUNT
        *value = number("NYBBLE_FAKE_MULTIPROCESSORS", 132);
    else
        return INVALID_VALUE;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    INJECT("cuDevicePrimaryCtxRetain");
    log_line("retain " + std::to_string(device));
    *context = &contexts[device];
    return SUCCESS;
}

int cuCtxGetCurrent(void **context) {
    *context = current;
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) {
    INJECT("cuCtxSetCurrent");
    current = (Context *)context;
    return SUCCESS;
}

int cuModuleLoadData(void **module, const void *image) {
    INJECT("cuModuleLoadData");
    if (!current)
        return INVALID_CONTEXT;
    bool cubin = memcmp(image, "\x7f"
                               "ELF",
                        4) == 0;
    bool ptx = strstr((const char *)image, ".version") && strstr((const char *)image, ".target");
    std::string refuse = text("NYBBLE_FAKE_REFUSE");
    if (cubin && refuse.find("cubin") != std::string::npos)
        return NO_BINARY;
    if (!cubin && ptx && refuse.find("ptx") != std::string::npos)
        return UNSUPPORTED_PTX;
    if (!cubin && !ptx)
        return INVALID_IMAGE;
    log_line(std::string("load ") + (cubin ? "cubin" : "ptx") + " device " +
             std::to_string(current->device));
    *module = current;
    return SUCCESS;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    bool on_tensor_cores = strstr(name, "linear4_small") || strstr(name, "linear4_mid");
    bool needs_bf16 = on_tensor_cores && strstr(name, "_bf16");
    if (needs_bf16 && number("NYBBLE_FAKE_CAPABILITY", 90) < 80)
        return NOT_FOUND;
    if (!emulator().knows(name))
        return NOT_FOUND;
    *function = new Kernel{(Context *)module, name, SHARED};
    return SUCCESS;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    INJECT("cuFuncSetAttribute");
    if (attribute != 8 || value < 0 || (unsigned)value > SHARED_AT_MOST) // MAX_DYNAMIC_SHARED_SIZE_BYTES
        return INVALID_VALUE;
    ((Kernel *)function)->shared_most = value;
    return SUCCESS;
}

#ifndef WITHOUT_CAPTURING
int cuStreamIsCapturing(void *stream, int *status) {
    *status = text("NYBBLE_FAKE_CAPTURING") == std::to_string((unsigned long)stream);
    return SUCCESS;
}
#endif

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **arguments, void **extra) {
    INJECT("cuLaunchKernel");
    const Kernel &kernel = *(Kernel *)function;
    if (current != kernel.context)
        return INVALID_CONTEXT;
    bool fits = gx >= 1 && gx <= 0x7fffffffu && gy >= 1 && gy <= 65535 && gz == 1 &&
                bx * by * bz >= 1 && bx * by * bz <= 1024 && shared <= kernel.shared_most;
    if (!fits || !arguments || extra)
        return INVALID_VALUE;
    log_line("launch " + kernel.name + " grid " + std::to_string(gx) + " " + std::to_string(gy) +
             " block " + std::to_string(bx) + " stream " + std::to_string((unsigned long)stream) +
             " device " + std::to_string(current->device));
    if (("," + text("NYBBLE_FAKE_EXIT") + ",").find("," + kernel.name + ",") != std::string::npos)
        _exit(71);
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    std::lock_guard<std::mutex> one_at_a_time(emulating);
    return emulator().run(kernel.name.c_str(), grid, block, shared, arguments[0]) ? LAUNCH_FAILED
                                                                                  : SUCCESS;
}

static const char *name_of(int code) {
    switch (code) {
    case NOT_INITIALIZED: return "CUDA_ERROR_NOT_INITIALIZED";
    case INVALID_CONTEXT: return "CUDA_ERROR_INVALID_CONTEXT";
    case NO_BINARY: return "CUDA_ERROR_NO_BINARY_FOR_GPU";
    case UNSUPPORTED_PTX: return "CUDA_ERROR_UNSUPPORTED_PTX_VERSION";
    case LAUNCH_FAILED: return "CUDA_ERROR_LAUNCH_FAILED";
    default: return nullptr;
    }
}

int cuGetErrorName(int code, const char **name) {
    *name = name_of(code);
    return *name ? SUCCESS : INVALID_VALUE;
}

int cuGetErrorString(int code, const char **string) {
    *string = name_of(code) ? "as the fake driver was told" : nullptr;
    return *string ? SUCCESS : INVALID_VALUE;
}

// For tests: the context of this thread, and making one current.
int nybble_fake_current(void) { return current ? current->device : -1; }
void nybble_fake_make_current(int device) { current = device < 0 ? nullptr : &contexts[device]; }
}
