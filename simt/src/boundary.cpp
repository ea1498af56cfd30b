// The linker puts this behind the emulator's code and before the program's.
extern "C" void simt_code_ends() {}
