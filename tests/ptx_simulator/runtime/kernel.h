// Everything that a translated kernel calls.
#pragma once
#include <cstring>

#include "approximate.h"
#include "arithmetic.h"
#include "memory.h"
#include "simulator.h"
#include "warp.h"
