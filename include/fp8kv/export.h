// Marks what the shared library exports; everything else is hidden.
#pragma once

#if defined(_WIN32)
#define FP8KV_API
#else
#define FP8KV_API __attribute__((visibility("default")))
#endif
