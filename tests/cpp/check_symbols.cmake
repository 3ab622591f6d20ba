# The kernels are compiled once per instruction set. An inline function that one of these object files defines outside its own
# namespace is a weak symbol, and the linker keeps any one definition of it: the AVX one could end up in code that runs on every
# processor. So these files define none. Arguments: NM, and OBJECTS, all object files of the library.
foreach(isa avx2 avx512)
  set(object ${OBJECTS})
  list(FILTER object INCLUDE REGEX "/kernels/${isa}\\.cpp\\.o(bj)?$")
  list(LENGTH object count)
  if(NOT count EQUAL 1)
    message(FATAL_ERROR "expected one object file of ${isa}, found ${count} among: ${OBJECTS}")
  endif()
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)
  if(NOT output MATCHES "fp8kv::cpu::${isa}::kernel_table")
    message(FATAL_ERROR "${NM} does not show the kernels of ${isa}:\n${output}")
  endif()
  string(REGEX MATCHALL "[^\n]+" lines "${output}")
  set(foreign ${lines})
  list(FILTER foreign INCLUDE REGEX "^[0-9a-f]* +[WVu] ")  # weak functions, weak objects, unique globals
  list(FILTER foreign EXCLUDE REGEX " fp8kv::cpu::${isa}::")
  if(foreign)
    list(JOIN foreign "\n  " names)
    message(FATAL_ERROR "weak symbols in the object file of ${isa}:\n  ${names}")
  endif()
endforeach()
