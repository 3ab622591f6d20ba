// The table of kernels of one instruction set. generic.cpp, avx2.cpp and avx512.cpp each include this file once.
#pragma once

#include "cpu/kernels/amax.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/offsets.h"
#include "cpu/kernels/rope.h"

namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE {
namespace {

template <class Op>
constexpr ElementwiseKernels elementwise_kernels = {prepare_rows<Op>, convert_rows<Op>, prepare_columns<Op>,
                                                    convert_columns<Op>, Op::kDynamicRows};

template <class Real, class... Quantized>
constexpr QuantizeRow quantize_row(core::TypeList<Quantized...>) {
  return {elementwise_kernels<QuantizeKernel<Real, Quantized>>...};
}

template <class Quantized, class... Real>
constexpr DequantizeRow dequantize_row(core::TypeList<Real...>) {
  return {elementwise_kernels<DequantizeKernel<Quantized, Real>>...};
}

template <class... Real, class... Quantized>
constexpr KernelTable make_table(core::TypeList<Real...>, core::TypeList<Quantized...>) {
  return {.quantize = {quantize_row<Real>(core::QuantizedTypes{})...},
          .dequantize = {dequantize_row<Quantized>(core::RealTypes{})...},
          .amax = {AmaxKernels{amax_rows<Real>, amax_columns<Real>}...},
          .offsets = {OffsetKernels{subtract_offsets<Real>, add_offsets<Real>}...},
          .transform = {transform_rows<Real>...},
          .attention = {attention_scores, attention_exponentials, attention_accumulate}};
}

}  // namespace

const KernelTable kernel_table = make_table(core::RealTypes{}, core::QuantizedTypes{});

}  // namespace fp8kv::cpu::FP8KV_ISA_NAMESPACE
