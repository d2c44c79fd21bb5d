// A device that is none: memory of this process, on which torch computes by way of the CPU.
//
// It is as strict as a GPU about what is where: an operator that is given a tensor of the CPU beside one of its own fails,
// and so does NumPy. New memory is NaN. As on Apple's GPUs, nothing is in float64. What torch lets a GPU take from the CPU it
// takes too: numbers (tensors without dimensions), and indices.
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using Ints = c10::IntArrayRef;
using SymInts = c10::SymIntArrayRef;
template <class T>
using Maybe = std::optional<T>;

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// -- what torch asks of a device: one stream, on which everything is done at once ------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Device one() { return {kType, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, one()); }

  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return one(); }
  c10::Device getDevice() const override { return one(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream given) const override { return given; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    void* data = bytes > 0 ? std::malloc(bytes) : nullptr;
    if (data) std::memset(data, 0xff, bytes);
    return {data, data, &std::free, Guard::one()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory);

struct Generator final : at::CPUGeneratorImpl {
  Generator() { device_ = Guard::one(); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Device getDeviceFromPtr(void*) const override { return Guard::one(); }
  at::Generator getNewGenerator(at::DeviceIndex) const override { return at::make_generator<Generator>(); }
  const at::Generator& getDefaultGenerator(at::DeviceIndex) const override {
    static const at::Generator one = at::make_generator<Generator>();
    return one;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, std::size_t bytes) const override {
    auto fresh = memory.allocate(bytes);
    if (const std::size_t kept = std::min(bytes, storage.nbytes())) std::memcpy(fresh.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

// -- operators that know of memory -----------------------------------------------------------------------------------------

void refuse_float64(Maybe<at::ScalarType> dtype) {
  TORCH_CHECK_TYPE(c10::dtype_or_default(dtype) != at::kDouble, "the device has no float64");
}

Tensor empty(Ints size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<at::Device>, Maybe<bool>,
             Maybe<at::MemoryFormat> format) {
  refuse_float64(dtype);
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Ints size, Ints stride, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<at::Device>, Maybe<bool>) {
  refuse_float64(dtype);
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}

Tensor as_cpu(const Tensor& given) {
  if (given.is_cpu()) return given;
  return at::from_blob(given.data_ptr(), given.sizes(), given.strides(), given.options().device(at::kCPU));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  as_cpu(to).copy_(as_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar number(const Tensor& given) { return as_cpu(given).item(); }

Tensor view(const Tensor& given, SymInts size) { return at::native::view(given, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor as_strided(const Tensor& given, SymInts size, SymInts stride, Maybe<c10::SymInt> offset) {
  const auto at = offset ? Maybe<std::int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(given, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at);
}

Tensor reshape_alias(const Tensor& given, SymInts size, SymInts stride) {
  return at::native::_reshape_alias(given, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resize(const Tensor& given, SymInts size, Maybe<at::MemoryFormat> format) {
  return at::native::resize_(given, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage(Tensor& given, at::Storage storage, c10::SymInt offset, SymInts size, SymInts stride) {
  given.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  given.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                                     offset.expect_int());
  return given;
}

Tensor& set_tensor(Tensor& given, const Tensor& source) {
  return set_storage(given, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}

Tensor& set_whole_storage(Tensor& given, at::Storage storage) {
  const c10::SymInt size = static_cast<std::int64_t>(storage.nbytes()) / given.itemsize(), step = 1;
  return set_storage(given, std::move(storage), 0, SymInts(&size, 1), SymInts(&step, 1));
}

// GEMMs of 16-bit operands with fp32 results, which torch has on a GPU alone.
Tensor mm(const Tensor& a, const Tensor& b, at::ScalarType dtype) { return at::mm(a.to(dtype), b.to(dtype)); }

Tensor& mm_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) {
  return at::mm_out(out, a.to(dtype), b.to(dtype));
}

Tensor addmm(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
             const at::Scalar& alpha) {
  return at::addmm(c, a.to(dtype), b.to(dtype), beta, alpha);
}

Tensor& addmm_out(const Tensor& c, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta,
                  const at::Scalar& alpha, Tensor& out) {
  return at::addmm_out(out, c, a.to(dtype), b.to(dtype), beta, alpha);
}

// -- all others ------------------------------------------------------------------------------------------------------------

// A GPU's tensors may be indexed by the CPU's.
const std::set<std::string> kIndexed = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.operator_name().name;
  const auto check = [&](const Tensor& given) {
    TORCH_CHECK(!given.defined() || !given.is_cpu() || given.dim() == 0 || kIndexed.count(name) > 0,
                "Expected all tensors to be on the same device: ", name, " was given one of shape ", given.sizes(),
                " on the CPU beside others of the device");
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& part : value.toTensorList()) check(part);
  }
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", number);
  m.impl("view", view);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("unfold", at::native::unfold);
  m.impl("mm.dtype", mm);
  m.impl("mm.dtype_out", mm_out);
  m.impl("addmm.dtype", addmm);
  m.impl("addmm.dtype_out", addmm_out);
}
