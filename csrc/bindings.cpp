#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/driver.h"
#include "plan.h"

namespace py = pybind11;
using nesterov_pp::Plan;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The one-pass optimizer step in C++.";
  m.def("isa", &nesterov_pp::cpu::isa, "The instruction set the CPU kernels run with.");
  m.def("isas", &nesterov_pp::cpu::isas, "The instruction sets this processor offers, narrowest first.");
  m.def("set_isa", &nesterov_pp::cpu::set_isa, py::arg("name"));

  py::class_<Plan>(m, "Plan")
      .def(py::init<std::vector<std::string>, std::vector<int64_t>, std::vector<std::vector<at::Tensor>>,
                    std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>,
                    std::vector<at::Tensor>>(),
           py::arg("names"), py::arg("groups"), py::arg("slots"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
           py::arg("steps"), py::arg("mu_products"))
      .def(
          "collect",
          [](Plan& plan, size_t grads_of, size_t from, size_t to) {
            std::vector<std::tuple<int64_t, double, double>> classes;
            for (const auto& c : plan.collect(grads_of, from, to)) classes.emplace_back(c.group, c.step, c.mu_product);
            return classes;
          },
          py::arg("grads_of"), py::arg("source"), py::arg("target"))
      .def("gradient_norm", &Plan::gradient_norm, py::call_guard<py::gil_scoped_release>())
      .def("nonfinite_parameter", &Plan::nonfinite_parameter)
      .def("apply", &Plan::apply, py::arg("rows"), py::arg("mu_products"), py::call_guard<py::gil_scoped_release>());
}
