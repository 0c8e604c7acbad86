// The Python module cen_ext._C. Importing it registers the ops of csrc/ops.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include "cen_build.h"  // written by setup.py
#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_info() {
  py::list compiled;
  for (const cen::cpu::InstructionSet& set : cen::cpu::instruction_sets()) compiled.append(set.name);
  py::dict info;
  info["compiler"] = kCompiler;
  info["torch"] = TORCH_VERSION;
  py::list architectures;
#if defined(CEN_CUDA)
  for (const int architecture : {CEN_CUDA}) architectures.append(architecture);
#endif
  info["cuda_architectures"] = architectures;
  info["instruction_sets"] = compiled;
  info["instruction_set"] = cen::cpu::instruction_set().name;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of cen_ext. Importing it registers torch.ops.cen_ext.*.";
  cen::cpu::instruction_set();  // reports an invalid CEN_EXT_CPU_CAPABILITY at import, not at the first call
  m.def("build_info", &build_info,
        "What was built: compiler, torch (the version compiled against), cuda_architectures (90 for 9.0), "
        "instruction_sets "
        "(of the CPU kernels), and instruction_set, the one that runs here.");
}
