// The tiles of the convolutions. A line is one instance of each kernel of its kind, and one line of the table from which
// src/backend/gpu/tiles.rs chooses (the build script reads this file). There is no include guard, as each kernel file
// includes it after it has defined the macros.
//
//   PIXELS     conv_fprop, conv_dgrad, codec_conv: pixels by channels, where channels are multiples of 64
//   FLAT       the same for any multiple of 8: k is flat over taps and channels, so that 8 channels are 72 products
//   GRADIENT   conv_wgrad: output channels by (tap, input channel)
//   HOPPER     hopper_fprop, hopper_dgrad, hopper_codec: PIXELS on sm_90a (conv_hopper.cu); m, n, stages, whether two groups of
//              threads work together on a tile, speed
//   HOPPER_GRADIENT  hopper_wgrad; m, n, stages, blocks of a multiprocessor, speed
//
//   m, n       the result's rows and columns; a step is 64 summands
//   stages     steps of both operands in shared memory, 128 (m + n) bytes each
//   warps      along m and along n
//   blocks     that the registers of a multiprocessor hold (launch bounds), with sums in f32, and in f16 in two levels
//   speed      of the inner loop in percent of the first line: it reads more shared memory, and L2 cache, for a product. Of
//              Hopper's as an H200 took them, the others are estimates; they only decide which tile is chosen
//
//        m    n   stages  warps   blocks   speed
PIXELS(128, 128,   3,     2, 4,   2, 1,    100)
PIXELS( 64, 128,   3,     2, 2,   3, 2,     90)
PIXELS( 64,  64,   3,     2, 2,   4, 3,     70)
PIXELS(128,  16,   3,     4, 1,   4, 3,     35)
FLAT(  128, 128,   3,     2, 4,   2, 1,    100)
FLAT(   64,  64,   3,     2, 2,   3, 3,     70)
GRADIENT(128, 128, 3,     2, 4,   2, 1,    100)
GRADIENT( 64,  64, 3,     2, 2,   4, 3,     65)
HOPPER(128, 256,   3,     1,                100)
HOPPER(256, 128,   3,     1,                100)
HOPPER(128, 128,   5,     0,                 90)
HOPPER( 64, 128,   6,     0,                 67)
HOPPER( 64,  64,   8,     0,                 39)
HOPPER_GRADIENT(128, 128, 3,     2,         100)
