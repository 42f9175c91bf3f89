// What the library shows to the outside; everything else is hidden (CMakeLists.txt).
#pragma once

#define LIT_BINQ_EXPORT extern "C" __attribute__((visibility("default")))
