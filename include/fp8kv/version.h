// The version of these headers. fp8kv::version() in runtime.h tells the version of the library in use.
#pragma once

#define FP8KV_VERSION_MAJOR 0
#define FP8KV_VERSION_MINOR 2
#define FP8KV_VERSION_PATCH 0

#define FP8KV_STRINGIZE_(x) #x
#define FP8KV_STRINGIZE(x) FP8KV_STRINGIZE_(x)
#define FP8KV_VERSION_STRING \
  FP8KV_STRINGIZE(FP8KV_VERSION_MAJOR) "." FP8KV_STRINGIZE(FP8KV_VERSION_MINOR) "." FP8KV_STRINGIZE(FP8KV_VERSION_PATCH)
