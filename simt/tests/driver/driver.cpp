#include "simt_driver.h"

int main() {
    const int n = 100;
    std::vector<float> values(n);
    for (int i = 0; i < n; i++) values[i] = float(i);
    simt::Array<float> in(values), out(n);
    if (!simt::run("scale<float>", 2, 64, 0, in, out, 2.0f, n)) return 1;
    for (int i = 0; i < n; i++)
        if (out.values()[i] != 2 * values[i]) return 1;
    // Wrong types and wrong names are errors that say what there is.
    return simt::run("copy", 1, 64, 0, in) || simt::run("cope", 1, 64, 0, in, out) || !simt::run("copy", 1, 64, 0, in, out);
}
