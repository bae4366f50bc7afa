// Digest and architectures that the library was built from, checked against the sources at load time.
#ifndef MINIKV_BUILD_INFO
#define MINIKV_BUILD_INFO "unknown"
#endif

extern "C" const char* minikv_build_info() { return MINIKV_BUILD_INFO; }
