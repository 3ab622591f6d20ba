# Target torch_stable: headers and libtorch of the Python in use, restricted to PyTorch's stable ABI of version 2.11.
# Sets FP8KV_TORCH_CUDA to the CUDA version of that PyTorch, empty for a build without CUDA.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import torch; print(torch.__path__[0], torch.version.cuda or '', torch.__version__.split('+')[0], sep=';')"
  OUTPUT_VARIABLE torch_info OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_failed)
if(torch_failed)
  message(FATAL_ERROR
    "fp8kv: ${Python_EXECUTABLE} can't import torch; install torch>=2.11, or build without -DFP8KV_TORCH=ON")
endif()
list(GET torch_info 0 torch_dir)
list(GET torch_info 1 FP8KV_TORCH_CUDA)
list(GET torch_info 2 torch_version)
if(torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "fp8kv: needs torch 2.11 or newer, found ${torch_version}")
endif()
message(STATUS "fp8kv: torch ${torch_version}, CUDA '${FP8KV_TORCH_CUDA}'")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${torch_dir}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020B000000000000ULL)
target_link_libraries(torch_stable INTERFACE -Wl,--no-as-needed "${torch_dir}/lib/libtorch.so" -Wl,--as-needed)
