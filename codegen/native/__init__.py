"""Write a block's experts as C++17, build them with the user's compiler and call them.

    spec ──emit.py──▶ source ──build.py──▶ shared library ──ctypes──▶ Kernel

`experts.cpp` is the layer, `dot.h` and `axpy.h` the two matrix products (weights stored
output-major and input-major), `math.h` the activations, `vec.h` the vector layer under them.
`linear.py` and `linear.cpp` do the same for a dense layer, with `dot.h`. `readers.cpp` is no
kernel: it is the queue of the threads that read experts from disk.
"""
