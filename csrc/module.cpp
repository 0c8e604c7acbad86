// The Python module cen_ext._C. Importing it registers the ops of csrc/ops.
//
// It keeps to the limited API of Python 3.10, so that one build serves that version and all newer ones.
#undef Py_LIMITED_API  // torch's build sets the oldest Python that this torch runs on
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <torch/headeronly/version.h>

#include <exception>
#include <initializer_list>

#include "cen_build.h"  // written by setup.py
#include "cpu/kernels.h"

// Programs without Python load this library for its ops alone, and find none of these.
#pragma weak PyErr_SetString
#pragma weak PyExc_ImportError
#pragma weak PyList_Append
#pragma weak PyList_New
#pragma weak PyModuleDef_Init
#pragma weak Py_BuildValue
#pragma weak Py_DecRef

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

// Appends a new reference to a list and releases it. Returns false, with an exception set, if that fails.
bool append(PyObject* list, PyObject* item) {
  const bool done = item != nullptr && PyList_Append(list, item) == 0;
  if (item != nullptr) Py_DecRef(item);
  return done;
}

bool append_architectures([[maybe_unused]] PyObject* list) {
#if defined(CEN_CUDA)
  for (const int architecture : {CEN_CUDA})
    if (!append(list, Py_BuildValue("i", architecture))) return false;
#endif
  return true;
}

bool append_instruction_sets(PyObject* list) {
  for (const cen::cpu::InstructionSet& set : cen::cpu::instruction_sets())
    if (!append(list, Py_BuildValue("s", set.name))) return false;
  return true;
}

PyObject* build_info(PyObject*, PyObject*) {
  PyObject* const architectures = PyList_New(0);
  PyObject* const instruction_sets = PyList_New(0);
  PyObject* info = nullptr;
  if (architectures != nullptr && instruction_sets != nullptr && append_architectures(architectures) &&
      append_instruction_sets(instruction_sets)) {
    info = Py_BuildValue("{s:s,s:s,s:O,s:O,s:s}", "compiler", kCompiler, "torch", TORCH_VERSION,
                         "cuda_architectures", architectures, "instruction_sets", instruction_sets,
                         "instruction_set", cen::cpu::instruction_set().name);
  }
  if (architectures != nullptr) Py_DecRef(architectures);
  if (instruction_sets != nullptr) Py_DecRef(instruction_sets);
  return info;
}

// Reports an invalid CEN_EXT_CPU_CAPABILITY at import, not at the first call.
int execute(PyObject*) {
  try {
    cen::cpu::instruction_set();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return -1;
  }
  return 0;
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "build_info()\n--\n\n"
     "What was built: compiler, torch (the version compiled against), cuda_architectures (90 for 9.0), "
     "instruction_sets (of the CPU kernels), and instruction_set, the one that runs here."},
    {},
};

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(execute)}, {}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "The compiled part of cen_ext. Importing it registers torch.ops.cen_ext.*.",
    0,
    methods,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
