#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/driver.h"
#include "../cpu/plan.h"
#include "../device/plan.h"
#include "memory.h"
#if defined(NPP_CUDA)
#include "../cuda/plan.h"
#endif

namespace py = pybind11;
using nesterov_pp::Dtype;
using nesterov_pp::Plan;
using nesterov_pp::Tensors;

namespace {

// Returns whether the parameter groups and the state hold exactly the objects of `known`: every parameter in order,
// then the dict of every parameter's state followed by its values. Compares pointers, without looking up any parameter.
bool holds(const py::list& groups, const py::dict& state, const py::list& known) {
  const Py_ssize_t size = PyList_GET_SIZE(known.ptr());
  Py_ssize_t next = 0;
  const auto is_next = [&](PyObject* object) { return next < size && PyList_GET_ITEM(known.ptr(), next++) == object; };
  static PyObject* const params = PyUnicode_InternFromString("params");
  for (const py::handle group : groups) {
    PyObject* list = PyDict_Check(group.ptr()) ? PyDict_GetItem(group.ptr(), params) : nullptr;
    if (list == nullptr || !PyList_Check(list)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i)
      if (!is_next(PyList_GET_ITEM(list, i))) return false;
  }
  Py_ssize_t entry = 0;
  PyObject *key, *values;
  while (PyDict_Next(state.ptr(), &entry, &key, &values)) {
    if (!THPVariable_Check(key)) continue;  // an entry that the user added
    if (!is_next(values) || !PyDict_Check(values)) return false;
    Py_ssize_t position = 0;
    PyObject *name, *value;
    while (PyDict_Next(values, &position, &name, &value))
      if (!is_next(value)) return false;
  }
  return next == size;
}

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return "double";
    case Dtype::kBFloat16:
      return "bfloat16";
    case Dtype::kHalf:
      return "half";
    case Dtype::kCode:
      return "code";
    case Dtype::kSplit:
      return "split";
    default:
      return "float";
  }
}

// Sets the places of every slot's parameters inside their Python objects, and keeps these objects alive.
void hold(Tensors& tensors, const std::vector<std::vector<py::object>>& slots) {
  auto owners = std::make_shared<std::vector<py::object>>();
  for (const auto& slot : slots) {
    auto& places = tensors.slots.emplace_back();
    for (const py::object& p : slot) {
      if (!THPVariable_Check(p.ptr())) throw py::type_error("a slot of a plan must be a list of tensors");
      places.push_back(&THPVariable_Unpack(p.ptr()));
      owners->push_back(p);
    }
  }
  tensors.owners = std::move(owners);
}

// Returns undefined tensors in place of None.
std::vector<at::Tensor> present(const std::vector<std::optional<at::Tensor>>& tensors) {
  std::vector<at::Tensor> found;
  for (const auto& t : tensors) found.push_back(t.value_or(at::Tensor()));
  return found;
}

struct Launch {
  at::Tensor table, chunks;
  int64_t tensors;
  std::array<const char*, 3> dtypes;
};

// A plan that leaves the launches to a function, which launches the kernels compiled by Triton.
class CallingPlan : public nesterov_pp::device::DevicePlan {
 public:
  using Function = std::function<void(at::Tensor rows, std::array<size_t, 3> slots)>;

  CallingPlan(Tensors tensors, std::optional<uint64_t> seed, Function launch, std::function<bool()> captures)
      : DevicePlan(std::move(tensors), seed), launch_(std::move(launch)), captures_(std::move(captures)) {}

  std::vector<Launch> launches() const {
    std::vector<Launch> found;
    for (const auto& g : groups())
      found.push_back({g.table,
                       g.chunks,
                       static_cast<int64_t>(g.members.size()),
                       {name_of(g.dtypes.weight), name_of(g.dtypes.grad), name_of(g.dtypes.moment)}});
    return found;
  }

 protected:
  bool captures() const override { return captures_(); }
  void launch(const at::Tensor& rows) override { launch_(rows, {slots_.grads, slots_.source, slots_.target}); }

 private:
  Function launch_;
  std::function<bool()> captures_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The one-pass optimizer step in C++.";
  m.def("isa", &nesterov_pp::cpu::isa, "Return the instruction set that the CPU kernels use.");
  m.def("isas", &nesterov_pp::cpu::isas, "Return the instruction sets that this processor offers, narrowest first.");
  m.def("set_isa", &nesterov_pp::cpu::set_isa, py::arg("name"));

  m.def("zeros_like", &nesterov_pp::zeros_like, py::arg("tensors"), py::arg("dtype"));
  m.def("holds", &holds, py::arg("groups"), py::arg("state"), py::arg("known"));

  py::class_<Tensors>(m, "Tensors")
      .def(py::init([](std::vector<std::string> names, std::vector<int64_t> numbers, std::vector<int64_t> groups,
                       const std::vector<std::vector<py::object>>& slots, std::vector<at::Tensor> exp_avgs,
                       std::vector<at::Tensor> exp_avg_sqs, const std::vector<std::optional<at::Tensor>>& masters,
                       std::vector<at::Tensor> steps, std::vector<at::Tensor> mu_products,
                       std::vector<at::Tensor> means, std::vector<at::Tensor> shadows, int normaliser, bool corrects,
                       int kind, bool ring_predicts, const std::vector<std::optional<at::Tensor>>& exp_avg_scales,
                       const std::vector<std::optional<at::Tensor>>& exp_avg_sq_scales,
                       const std::vector<std::optional<at::Tensor>>& residuals, uint64_t code_seed) {
             const bool predicts = !shadows.empty();
             Tensors tensors{std::move(names),
                             std::move(numbers),
                             std::move(groups),
                             {},
                             {},
                             std::move(exp_avgs),
                             std::move(exp_avg_sqs),
                             {},
                             std::move(steps),
                             std::move(mu_products),
                             std::move(means),
                             std::move(shadows),
                             present(exp_avg_scales),
                             present(exp_avg_sq_scales),
                             present(residuals),
                             code_seed,
                             {static_cast<nesterov_pp::Normaliser>(normaliser),
                              static_cast<nesterov_pp::CorrectionKind>(kind), predicts},
                             corrects,
                             ring_predicts};
             hold(tensors, slots);
             tensors.masters = present(masters);
             return tensors;
           }),
           py::kw_only(), py::arg("names"), py::arg("numbers"), py::arg("groups"), py::arg("slots"),
           py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::arg("masters"), py::arg("steps"), py::arg("mu_products"),
           py::arg("means"), py::arg("shadows"), py::arg("normaliser"), py::arg("corrects"), py::arg("kind"),
           py::arg("ring_predicts"), py::arg("exp_avg_scales"), py::arg("exp_avg_sq_scales"), py::arg("residuals"),
           py::arg("code_seed"));

  py::class_<Plan>(m, "Plan")
      .def_property_readonly("on_device", [](const Plan&) { return false; })
      .def(
          "collect",
          [](Plan& plan, const std::array<size_t, 3>& slots) {
            std::vector<std::tuple<int64_t, double, double>> classes;
            for (const auto& c : plan.collect({slots[0], slots[1], slots[2]}))
              classes.emplace_back(c.group, c.step, c.mu_product);
            return classes;
          },
          py::arg("slots"))
      .def("forget", &Plan::forget)
      .def_property_readonly("steps_run", &Plan::steps_run)
      .def("nonfinite_parameter", &Plan::nonfinite_parameter)
      .def("apply", &Plan::apply, py::arg("rows"), py::arg("mu_products"),
           py::arg("corrections") = std::vector<nesterov_pp::CorrectionRow>(),
           py::call_guard<py::gil_scoped_release>());

  using nesterov_pp::cpu::CpuPlan;
  py::class_<CpuPlan, Plan>(m, "CpuPlan")
      .def(py::init<Tensors, std::optional<uint64_t>>(), py::arg("tensors"), py::arg("seed"))
      .def("gradient_norm", &CpuPlan::gradient_norm, py::call_guard<py::gil_scoped_release>());

  py::class_<Launch>(m, "Launch", "The arguments of one kernel launch, for the tensors that have the same dtypes.")
      .def_readonly("table", &Launch::table)
      .def_readonly("chunks", &Launch::chunks)
      .def_readonly("tensors", &Launch::tensors)
      .def_readonly("dtypes", &Launch::dtypes, "dtypes of weights (masters if any), gradients and moments");

  py::class_<CallingPlan, Plan>(m, "DevicePlan",
                                "A plan whose pass calls `launch(rows, slots)`, in a graph if `captures()`.")
      .def(py::init<Tensors, std::optional<uint64_t>, CallingPlan::Function, std::function<bool()>>(),
           py::arg("tensors"), py::arg("seed"), py::arg("launch"), py::arg("captures"))
      .def("apply_rows", &CallingPlan::apply_rows, py::arg("rows"))
      .def("launches", &CallingPlan::launches);

#if defined(NPP_CUDA)
  using nesterov_pp::cuda::CudaPlan;
  py::class_<CudaPlan, Plan>(m, "CudaPlan")
      .def(py::init<Tensors, std::optional<uint64_t>>(), py::arg("tensors"), py::arg("seed"))
      .def_property_readonly("on_device", [](const CudaPlan&) { return true; })
      .def("gradient_norm", &CudaPlan::gradient_norm, py::call_guard<py::gil_scoped_release>())
      .def("apply_rows", &CudaPlan::apply_rows, py::arg("rows"), py::call_guard<py::gil_scoped_release>())
      .def("scale", &CudaPlan::scale, py::arg("scale"), py::arg("limit"), py::arg("grad_scale"));
#endif
}
