// srppo_kernels._C: importing it registers the kernels (torch.ops.srppo_native.*, defined in the ops' folders); what it
// offers by itself is what `srppo env` prints.
#include <pybind11/pybind11.h>  // first, as Python.h says what the C library's headers declare

#include <string>

#include <torch/csrc/stable/ops.h>

#include "common/cpu_level.h"

#if defined(SRPPO_CUDA)
extern "C" int cudaDriverGetVersion(int*);  // of the runtime, without its headers: this file is the host compiler's
extern "C" int cudaRuntimeGetVersion(int*);
#endif

namespace py = pybind11;

namespace {

using srppo::CpuLevel;

std::string name_of(CpuLevel level) { return srppo::kCpuLevelNames[static_cast<int>(level)]; }

CpuLevel level_of(const std::string& name) {
  std::string known;
  for (int i = 0; i < 5; ++i) {
    if (name == srppo::kCpuLevelNames[i]) return static_cast<CpuLevel>(i);
    known += std::string(i ? ", " : "") + srppo::kCpuLevelNames[i];
  }
  throw py::value_error("unknown CPU level '" + name + "'; choose one of " + known);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["torch_target_version"] = "2.11";
#if defined(SRPPO_CUDA)
  info["cuda"] = SRPPO_CUDA;  // architectures, as setup.py passed them
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);  // 0 where there is none
  info["cuda_runtime"] = runtime;  // 13010: CUDA 13.1, which the kernels are linked with
  info["cuda_driver"] = driver;    // the latest that the driver runs
#else
  info["cuda"] = "";
#endif
  info["cpu_detected"] = name_of(srppo::detected_cpu_level());
  info["cpu_level"] = name_of(srppo::cpu_level());
  const char* amx_obstacle = srppo::amx_obstacle();
  info["amx"] = amx_obstacle ? amx_obstacle : "on: its tiles multiply correctly here";
  info["threads"] = torch::stable::get_num_threads();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of srppo; registers torch.ops.srppo_native.";
  m.def("build_info", &build_info, "Compiler, build options and CPU capabilities.");
  m.def("cpu_level", [] { return name_of(srppo::cpu_level()); }, "The instruction level in use.");
  m.def(
      "set_cpu_level", [](const std::string& name) { return name_of(srppo::set_cpu_level(level_of(name))); },
      py::arg("name"), "Cap the instruction level (for tests); returns the level now in use, never above the detected one.");
}
