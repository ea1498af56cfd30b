// simt-check: compiles .cu files for the emulator and runs them in both builds and all thread orders.
// README.md tells how; `simt-check --help` lists the options.
#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "translate.h"

namespace fs = std::filesystem;
using std::string;
using std::vector;

static const char kHelp[] = R"(simt-check: runs CUDA programs on the CPU and looks for races, unwritten reads, accesses out of bounds, wrong barriers

    simt-check FILE.cu... [--run DRIVER.cpp] [options] [-- ARGUMENTS]

The files, and the driver if there is one, have a main() together. It runs once in each build and thread order.

    --run FILE        a program that runs kernels by name (simt_driver.h)
    --kernel NAME     this kernel must have run, and only its findings count
    --build B         normal, checked, or both (the default)
    --order O         forward, reversed, random, or all (the default)
    --seeds N         so many random orders (1)
    --threads N       OS threads for blocks (1)
    --strict          a barrier that is short of a thread which has left the kernel is an error
    --timeout S       seconds for a run (600)
    --junit FILE      results as JUnit XML
    --sarif FILE      findings as SARIF
    -I, -D, -std, -O  for the compiler ($CXX, else c++)
    --library FILE    only makes the shared library, of the one build that --build names
    --keep DIR        where to compile; it stays, and what has not changed is not compiled again

The emulator itself is compiled once, and kept in $XDG_CACHE_HOME/simt-check or ~/.cache/simt-check.

Exit code: 0 nothing found, 1 findings in kernels, 2 main() failed or hung, 3 does not compile or wrong options.
)";

struct Options {
    vector<string> sources, arguments, flags, builds = {"normal", "checked"}, orders = {"forward", "reversed", "random"};
    string kernel, junit, sarif, library, keep;
    int seeds = 1, threads = 1, timeout = 600;
    bool strict = false;
};

// Why nothing could be checked, in lines: exit code 3.
struct Impossible {
    string why;
};
[[noreturn]] static void usage(const string& message) { throw Impossible{"simt-check: " + message + " (see --help)"}; }

static Options parse(int argc, char** argv) {
    Options o;
    auto number = [](const string& name, const string& text) {
        const int value = atoi(text.c_str());
        if (value < 1 || text.find_first_not_of("0123456789") != text.npos) usage(name + ": a number from 1, found " + text);
        return value;
    };
    for (int i = 1; i < argc; i++) {
        const string a = argv[i];
        auto next = [&] {
            if (++i == argc) usage(a + " needs a value");
            return string(argv[i]);
        };
        auto one_of = [&](vector<string>& to, const string& all) {
            const string value = next();
            if (value == all) return;
            for (const string& known : to)
                if (known == value) return void(to = {value});
            usage(a + ": no " + value);
        };
        if (a == "--help" || a == "-h") printf("%s", kHelp), exit(0);
        else if (a == "--run") o.sources.push_back(next());
        else if (a == "--kernel") o.kernel = next();
        else if (a == "--build") one_of(o.builds, "both");
        else if (a == "--order") one_of(o.orders, "all");
        else if (a == "--seeds") o.seeds = number(a, next());
        else if (a == "--threads") o.threads = number(a, next());
        else if (a == "--timeout") o.timeout = number(a, next());
        else if (a == "--strict") o.strict = true;
        else if (a == "--junit") o.junit = next();
        else if (a == "--sarif") o.sarif = next();
        else if (a == "--library") o.library = next();
        else if (a == "--keep") o.keep = next();
        else if (a == "--") o.arguments.assign(argv + i + 1, argv + argc), i = argc;
        else if (a == "-I" || a == "-D") o.flags.push_back(a + next());
        else if (a.compare(0, 2, "-I") == 0 || a.compare(0, 2, "-D") == 0 || a.compare(0, 2, "-O") == 0 || a.compare(0, 4, "-std") == 0) o.flags.push_back(a);
        else if (a[0] == '-') usage("no option " + a);
        else o.sources.push_back(a);
    }
    if (o.sources.empty()) usage("no file");
    if (!o.library.empty() && o.builds.size() != 1) usage("--library needs --build normal or --build checked");
    return o;
}

// ---- compiling --------------------------------------------------------------------------------------

static const vector<string> kFlags = {"-std=c++17", "-O2", "-g1", "-fPIC", "-w", "-fno-strict-aliasing", "-fwrapv", "-fno-math-errno",
    "-ffp-contract=off", "-fstack-clash-protection", "-fno-gnu-unique", "-fno-extern-tls-init", "-mtls-dialect=gnu", "-fno-threadsafe-statics"};
static const vector<string> kCheckedKernel = {
    "-fsanitize=thread,alignment,shift,bounds,float-cast-overflow,integer-divide-by-zero", "--param=tsan-instrument-func-entry-exit=0", "--param=tsan-distinguish-volatile=1",
    "-fno-optimize-sibling-calls"};

static string read_file(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return string(std::istreambuf_iterator<char>(file), {});
}

static string quoted(const string& word) {
    string text = "'";
    for (char c : word) text += c == '\'' ? "'\\''" : string(1, c);
    return text + "'";
}

// What is no part of the emulator: by the names of headers; where one ends in '/', by how they begin.
static const std::pair<const char*, const char*> kLibraries[] = {
    {"CUB", "cub/"}, {"Thrust", "thrust/"}, {"libcu++", "cuda/std/ cuda/experimental/ nv/target"}, {"CUTLASS", "cutlass/ cute/"},
    {"cuBLAS", "cublas.h cublas_api.h cublas_v2.h cublasLt.h cublasXt.h"},
    {"cuDNN", "cudnn.h cudnn_adv.h cudnn_adv_infer.h cudnn_adv_train.h cudnn_backend.h cudnn_cnn.h cudnn_cnn_infer.h cudnn_cnn_train.h cudnn_frontend.h "
              "cudnn_graph.h cudnn_ops.h cudnn_ops_infer.h cudnn_ops_train.h cudnn_version.h"},
    {"cuFFT", "cufft.h cufftw.h cufftXt.h"},
    {"cuRAND", "curand.h curand_discrete.h curand_discrete2.h curand_globals.h curand_kernel.h curand_lognormal.h curand_mrg32k3a.h curand_mtgp32.h "
               "curand_mtgp32_host.h curand_mtgp32_kernel.h curand_normal.h curand_philox4x32_x.h curand_poisson.h curand_precalc.h curand_uniform.h"},
    {"cuSPARSE", "cusparse.h cusparse_v2.h cusparseLt.h"}, {"cuSOLVER", "cusolver_common.h cusolverDn.h cusolverMg.h cusolverRf.h cusolverSp.h"},
    {"NVML", "nvml.h"}, {"NVRTC", "nvrtc.h"}, {"NCCL", "nccl.h"},
    {"NPP", "npp.h nppcore.h nppdefs.h nppi.h nppi_arithmetic_and_logical_operations.h nppi_color_conversion.h nppi_data_exchange_and_initialization.h "
            "nppi_filtering_functions.h nppi_geometry_transforms.h nppi_linear_transforms.h nppi_morphological_operations.h nppi_statistics_functions.h "
            "nppi_support_functions.h nppi_threshold_and_compare_operations.h npps.h npps_arithmetic_and_logical_operations.h npps_conversion_functions.h "
            "npps_filtering_functions.h npps_initialization.h npps_statistics_functions.h npps_support_functions.h"},
    {"NVTX", "nvToolsExt.h nvToolsExtCuda.h nvToolsExtCudaRt.h nvToolsExtSync.h nvtx3/"},
    {"textures", "texture_fetch_functions.h texture_indirect_functions.h texture_types.h cuda_texture_types.h"},
    {"surfaces", "surface_functions.h surface_indirect_functions.h surface_types.h cuda_surface_types.h"},
    {"graphics interoperability", "cuda_gl_interop.h cuda_egl_interop.h cuda_vdpau_interop.h"},
    {"8-bit floats", "cuda_fp8.h"}, {"6-bit floats", "cuda_fp6.h"}, {"4-bit floats", "cuda_fp4.h"}};

static const char* library_of(const string& header) {
    // libcu++'s own have no extension: cuda/atomic.
    if (header.compare(0, 5, "cuda/") == 0 && header.find_first_of("./", 5) == header.npos) return "libcu++";
    for (const auto& [library, names] : kLibraries) {
        std::istringstream words(names);
        for (string name; words >> name;)
            if (name.back() == '/' ? header.compare(0, name.size(), name) == 0 : header == name) return library;
    }
    return nullptr;
}

// What of CUDA the emulator has not, by how names begin that the compiler does not know. Where such a name goes on, it does
// so by another word: tex2DLod and cudaGraph_t are such names, text and cudaGraphite are none.
static const char* missing_part(const string& name) {
    static const std::pair<const char*, const char*> parts[] = {
        {"cudaGraphics", "graphics interoperability"}, {"cudaGraph", "graphs"}, {"cudaStreamBeginCapture", "graphs"}, {"cudaStreamEndCapture", "graphs"},
        {"cudaTexture", "textures"}, {"cudaCreateTexture", "textures"}, {"cudaBindTexture", "textures"},
        {"cudaSurface", "surfaces"}, {"cudaCreateSurface", "surfaces"}, {"cudaMallocArray", "arrays for textures"}, {"cudaMalloc3DArray", "arrays for textures"},
        {"cudaMallocMipmapped", "arrays for textures"}, {"cudaIpc", "memory between processes"}, {"cudaMemPool", "memory pools"},
        {"cudaImportExternal", "external memory"}};
    for (const auto& [beginning, part] : parts)
        if (name.compare(0, strlen(beginning), beginning) == 0 && !islower((unsigned char)name[strlen(beginning)])) return part;
    for (const bool texture : {true, false})
        for (const char* dimensions : {"1D", "2D", "3D", "Cubemap"}) {
            const string beginning = string(texture ? "tex" : "surf") + dimensions;
            if (name.compare(0, beginning.size(), beginning)) continue;
            string rest = name.substr(beginning.size());
            if (rest.compare(0, 7, "Layered") == 0) rest.erase(0, 7);
            for (const char* known : {"", "Lod", "Grad", "fetch", "gather", "read", "write"})
                if (rest == known) return texture ? "textures" : "surfaces";
        }
    return nullptr;
}

// Of what the compiler says, one line where all that is missing is a header of such a library, or a part of CUDA. That a program
// has names of its own that look like CUDA's is no error.
static string clearer(const string& said) {
    std::istringstream lines(said);
    for (string line; std::getline(lines, line);) {
        auto answer = [&](size_t at, const string& name, const char* part) {  // "file:line:column", without the column
            return line.substr(0, line.rfind(':', at - 1)) + ": error: " + name + ": the emulator has no " + part + "\n";
        };
        const string fatal = ": fatal error: ", error = ": error: ";
        size_t at = line.find(fatal);
        if (const size_t colon = line.find(": No such file", at); at != line.npos && colon != line.npos) {
            const string header = line.substr(at + fatal.size(), colon - at - fatal.size());
            if (const char* library = library_of(header)) return answer(at, header, library);
        }
        at = line.find(error);
        const size_t open = at == line.npos ? at : line.find('\'', at), close = open == line.npos ? open : line.find('\'', open + 1);
        if (close == line.npos) continue;
        const string before = line.substr(at + error.size(), open - at - error.size()), behind = line.substr(close + 1);
        auto begins = [](const string& text, std::initializer_list<const char*> beginnings) {
            return std::any_of(beginnings.begin(), beginnings.end(), [&](const char* b) { return text.compare(0, strlen(b), b) == 0; });
        };
        const bool unknown = (before.empty() && begins(behind, {" was not declared", " does not name a type", " has not been declared"})) ||
                             begins(before, {"use of undeclared identifier", "unknown type name", "there are no arguments to"});
        const string name = line.substr(open + 1, close - open - 1);
        if (const char* part = unknown ? missing_part(name) : nullptr) return answer(at, name, part);
    }
    return said;
}

// Does the work on all processors.
static vector<fs::path> in_parallel(const vector<std::function<fs::path()>>& work) {
    vector<fs::path> results(work.size());
    vector<string> failures(work.size());
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    auto worker = [&] {
        for (size_t i; (i = next++) < work.size() && !failed;) {
            try {
                results[i] = work[i]();
            } catch (const Impossible& e) {
                failures[i] = e.why, failed = true;
            }
        }
    };
    vector<std::thread> threads;
    for (unsigned i = 1; i < std::min<size_t>(std::thread::hardware_concurrency(), work.size()); i++) threads.emplace_back(worker);
    worker();
    for (std::thread& t : threads) t.join();
    if (!failed) return results;
    string all;  // both builds say the same
    for (const string& why : failures)
        if (all.find(why) == all.npos) all += why;
    throw Impossible{all};
}

// Where simt is: the directory above the one that holds this program, or $SIMT_HOME.
static fs::path home() {
    if (const char* set = getenv("SIMT_HOME")) return fs::weakly_canonical(set);  // as the preprocessor will name its headers
    for (fs::path p = fs::read_symlink("/proc/self/exe").parent_path(); p.has_relative_path(); p = p.parent_path())
        for (const fs::path& candidate : {p, p / "share/simt"})
            if (fs::exists(candidate / "include/simt.h")) return candidate;
    usage("cannot find include/simt.h: set SIMT_HOME");
}

// For what is the same for all programs. Where it cannot be made, that is where the program is compiled.
static fs::path cache(const fs::path& otherwise) {
    const char *set = getenv("XDG_CACHE_HOME"), *user = getenv("HOME");
    if (!set && !user) return otherwise;
    const fs::path directory = (set ? fs::path(set) : fs::path(user) / ".cache") / "simt-check";
    std::error_code error;
    fs::create_directories(directory, error);
    return access(directory.c_str(), W_OK) ? otherwise : fs::absolute(directory);
}

struct Compiler {
    const Options& options;
    fs::path simt, directory;
    string cxx;
    fs::path shared = {};

    // The compiler, which makes `made`.
    void command(const vector<string>& words, const fs::path& made) const {
        const fs::path said = directory / (made.filename().string() + "." + std::to_string(getpid()) + ".said");
        string text = "LC_ALL=C ";
        for (const string& w : words) text += quoted(w) + " ";
        const int code = system((text + "2> " + quoted(said.string())).c_str());
        const string why = read_file(said);
        fs::remove(said);
        if (code) throw Impossible{clearer(why)};
        fprintf(stderr, "%s", why.c_str());
    }

    // What is made of the same bytes by the same compiler and flags.
    fs::path made_of(const fs::path& name, const string& text, const vector<string>& words) const {
        string all = cxx + text;
        for (const string& w : words) all += '\n' + w;
        return name.string() + "-" + std::to_string(std::hash<string>()(all));
    }

    // It is not made again.
    fs::path make(const fs::path& made, const vector<string>& words, const fs::path& input) const {
        if (fs::exists(made)) return made;
        const fs::path partial = made.string() + "." + std::to_string(getpid());
        vector<string> c = {cxx};
        c.insert(c.end(), words.begin(), words.end());
        c.insert(c.end(), {input.string(), "-o", partial.string()});
        command(c, partial);
        fs::rename(partial, made);
        return made;
    }
    fs::path object(const fs::path& name, const string& text, vector<string> words, const fs::path& input) const {
        words.push_back("-c");
        return make(made_of(name, text, words).string() + ".o", words, input);
    }

    vector<string> flags(bool checked) const {
        vector<string> f = kFlags;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) f.insert(f.end(), {"-mavx2", "-mfma", "-mf16c"});
        if (checked) f.push_back("-DSIMT_CHECKED");
        return f;
    }

    string headers() const {
        string text;
        for (const fs::path& d : {simt / "src", simt / "include"})
            for (const auto& e : fs::directory_iterator(d))
                if (e.path().extension() == ".h") text += read_file(e.path());
        return text;
    }

    // What has no part in the checks is the same in both builds.
    fs::path runtime(const fs::path& source, bool checked) {
        const string text = read_file(source);
        checked &= text.find("check_") != text.npos || text.find("kChecked") != text.npos;
        vector<string> f = flags(checked);
        f.insert(f.end(), {"-g0", "-I" + (simt / "include").string()});  // no finding names its lines, and it is linked sooner
        return object(shared / (source.stem().string() + (checked ? ".checked" : "")), headers() + text, f, source);
    }

    // What every file begins with, as nvcc has its runtime API before the first line. The compiler has read it before: to read
    // it takes longer than most files' own lines.
    fs::path prelude(bool special_functions) const {
        vector<string> words = flags(false);
        for (const string& word : options.flags)
            if (word.compare(0, 4, "-std") == 0 || word.compare(0, 3, "-D_") == 0) words.push_back(word);
        if (special_functions) words.push_back("-DSIMT_SPECIAL_FUNCTIONS");
        words.insert(words.end(), {"-DSIMT_SOURCE_STEP", "-x", "c++-header"});
        const fs::path header = made_of(shared / "prelude", headers(), words).string() + ".h", partial = header.string() + "." + std::to_string(getpid());
        static std::mutex one;  // of all files
        const std::lock_guard<std::mutex> lock(one);
        if (fs::exists(header.string() + ".gch")) return header;
        std::ofstream text(partial);
        for (const char* name : {"simt.h", "cuda_runtime.h", "cooperative_groups.h"}) text << "#include \"" << (simt / "include" / name).string() << "\"\n";
        text.close();
        fs::rename(partial, header);
        make(header.string() + ".gch", words, header);
        return header;
    }

    // Whether a file of the program's names __CUDA_ARCH__.
    static bool asks_for_architecture(const string& text, const std::function<bool(const string&)>& skipped) {
        std::set<string> seen;
        std::istringstream lines(text);
        for (string line; std::getline(lines, line);) {
            if (line[0] != '#') continue;
            const translate::Marker marker(line);
            if (marker.line && !marker.system && !skipped(marker.file) && seen.insert(marker.file).second && fs::is_regular_file(marker.file) && read_file(marker.file).find("__CUDA_ARCH__") != string::npos) return true;
        }
        return false;
    }

    translate::Result translated(const string& source, const fs::path& made, bool special_functions) {
        const fs::path expanded = made.string() + "." + std::to_string(getpid()) + ".ii";
        // A program's own macros come behind the prelude, lest a T or an N of theirs be one of its names; those with an
        // underscore are for system headers.
        const fs::path macros = expanded.string() + ".h";
        std::ofstream text_of_macros(macros);
        vector<string> words;
        for (const string& word : options.flags) {
            if (word.compare(0, 2, "-D") || word[2] == '_') { words.push_back(word); continue; }
            const size_t equals = word.find('=');
            text_of_macros << "#define " << word.substr(2, equals - 2) << " " << (equals == word.npos ? "1" : word.substr(equals + 1)) << "\n";
        }
        text_of_macros.close();
        vector<string> c = {cxx, "-E", "-fpch-preprocess", "-x", "c++", "-DSIMT_SOURCE_STEP", "-include", prelude(special_functions).string(), "-include", macros.string(), "-I" + (simt / "include").string()};
        const vector<string> f = flags(false);
        c.insert(c.end(), f.begin(), f.end());
        c.insert(c.end(), words.begin(), words.end());
        if (special_functions) c.push_back("-DSIMT_SPECIAL_FUNCTIONS");
        c.insert(c.end(), {source, "-o", expanded.string()});
        struct Remover {
            fs::path path;
            ~Remover() { fs::remove(path); }
        } remover{macros};
        auto preprocessed = [&] {
            command(c, expanded);
            string text = read_file(expanded);
            fs::remove(expanded);
            // Objects are known by this text: it must not name a file of this process's.
            for (size_t at; (at = text.find(macros.string())) != text.npos;) text.replace(at, macros.string().size(), "<command-line>");
            return text;
        };
        string text = preprocessed();
        const string own = (simt / "include").string();
        auto skipped = [&](const string& file) { return file.compare(0, own.size(), own) == 0; };
        if (asks_for_architecture(text, skipped)) {
            c.push_back("-D__CUDA_ARCH__=860");
            text = translate::merged(preprocessed(), text, skipped);
        }
        return translate::source(text, skipped);
    }

    // Of the user's source: what the compiler reads, the same in both builds.
    fs::path translated(const string& source) {
        // Two files may have one name.
        const fs::path made = directory / (fs::path(source).filename().string() + "." + std::to_string(std::hash<string>()(source)) + ".ii");
        translate::Result result = translated(source, made, false);
        if (result.special_functions) result = translated(source, made, true);
        for (const string& line : std::set<string>(result.unknown.begin(), result.unknown.end())) fprintf(stderr, "%s: an error if a thread comes there\n", line.c_str());
        std::ofstream(made, std::ios::binary) << result.text;
        return made;
    }

    fs::path kernels(const fs::path& source, bool checked) {
        vector<string> words = flags(checked);
        if (checked) words.insert(words.end(), kCheckedKernel.begin(), kCheckedKernel.end());
        for (const string& flag : options.flags)
            if (flag[1] != 'I' && flag[1] != 'D') words.push_back(flag);
        words.insert(words.end(), {"-x", "c++-cpp-output"});
        return object(directory / (source.stem().stem().string() + (checked ? ".checked" : "")), read_file(source), words, source);
    }

    // The builds' libraries. Into `to`, if it is given, goes that of the only build.
    vector<fs::path> libraries(const fs::path& to = {}) {
        vector<std::function<fs::path()>> first, second, links;
        for (const string& source : options.sources) first.push_back([=] { return translated(source); });
        // What takes long before the rest, lest one processor be left with it.
        vector<fs::path> own;
        for (const auto& e : fs::directory_iterator(simt / "src"))
            if (e.path().extension() == ".cpp" && e.path().stem() != "simt-check") own.push_back(e.path());
        std::sort(own.begin(), own.end(), [](const fs::path& a, const fs::path& b) { return fs::file_size(a) > fs::file_size(b); });  // boundary.cpp is the last
        for (const fs::path& source : own)
            for (const string& build : options.builds) first.push_back([=] { return runtime(source, build == "checked"); });
        vector<fs::path> sources = in_parallel(first);
        const vector<fs::path> runtimes(sources.begin() + long(options.sources.size()), sources.end());
        sources.resize(options.sources.size());
        for (const string& build : options.builds)
            for (const fs::path& source : sources) second.push_back([=] { return kernels(source, build == "checked"); });
        const vector<fs::path> programs = in_parallel(second);
        for (size_t b = 0; b < options.builds.size(); b++)
            links.push_back([&, b] {
                const fs::path library = to.empty() ? directory / ("lib" + options.builds[b] + ".so") : to;
                vector<string> c = {cxx, "-shared", "-pthread", "-Wl,-Bsymbolic,--no-undefined", "-o", library.string()};
                // The runtime first: of an inline function that both have, its copy must be the one that is not instrumented.
                for (size_t i = b; i < runtimes.size(); i += options.builds.size()) c.push_back(runtimes[i].string());
                for (size_t i = 0; i < sources.size(); i++) c.push_back(programs[b * sources.size() + i].string());
                c.push_back("-ldl");
                // What it was last made of.
                const fs::path stamp = library.string() + ".of";
                string objects;
                for (const string& word : c) objects += word + "\n";
                if (to.empty() && fs::exists(library) && read_file(stamp) == objects) return library;
                // Whoever is stopped here leaves no library that is taken for whole.
                if (to.empty()) fs::remove(stamp);
                const fs::path partial = library.string() + "." + std::to_string(getpid());
                *std::find(c.begin(), c.end(), library.string()) = partial.string();
                command(c, partial);
                fs::rename(partial, library);
                if (to.empty()) std::ofstream(stamp, std::ios::binary) << objects;
                return library;
            });
        return in_parallel(links);
    }
};

// ---- running ----------------------------------------------------------------------------------------

struct Run {
    string build, order;
    int seed = 0;
    vector<string> findings;  // "fault" and "refused" lines, without the word
    std::set<string> launched;
    string failure;  // of main()
    double seconds = 0;

    string name() const { return build + ", " + order + (seed > 1 ? " " + std::to_string(seed) : ""); }
};

[[noreturn]] static void child(const Options& o, const fs::path& library, const Run& run) {
    void* handle = dlopen(library.c_str(), RTLD_NOW);
    if (!handle) fprintf(stderr, "%s\n", dlerror()), _exit(127);
    auto* config = reinterpret_cast<int (*)(const char*, uint64_t)>(dlsym(handle, "emu_config"));
    config("order", run.order == "forward" ? 0 : run.order == "reversed" ? 1 : 2);
    config("seed", uint64_t(run.seed)), config("threads", uint64_t(o.threads)), config("strict", o.strict), config("undefined", !o.strict), config("ticking", 1);
    auto* entry = reinterpret_cast<int (*)(int, char**)>(dlsym(handle, "main"));
    if (!entry) _exit(126);
    vector<char*> arguments;
    string self = o.sources[0];
    arguments.push_back(self.data());
    for (const string& a : o.arguments) arguments.push_back(const_cast<char*>(a.c_str()));
    arguments.push_back(nullptr);
    alarm(unsigned(o.timeout));
    exit(entry(int(arguments.size()) - 1, arguments.data()));
}

static Run execute(const Options& o, const fs::path& library, Run run, const fs::path& report) {
    fs::remove(report);
    setenv("SIMT_REPORT", report.c_str(), 1);
    fflush(nullptr);
    timespec begun, ended;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    const pid_t pid = fork();
    if (pid == 0) child(o, library, run);
    int status = 0;
    waitpid(pid, &status, 0);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    run.seconds = double(ended.tv_sec - begun.tv_sec) + 1e-9 * double(ended.tv_nsec - begun.tv_nsec);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) run.failure = "main() did not end within " + std::to_string(o.timeout) + " s";
    else if (WIFSIGNALED(status)) run.failure = string("main() was ended by ") + strsignal(WTERMSIG(status));
    else if (WEXITSTATUS(status) == 126) usage("no main() in the files; --run names a program that has one");
    else if (WEXITSTATUS(status)) run.failure = "main() returned " + std::to_string(WEXITSTATUS(status));
    // A template's bare name is that of all its instances.
    auto is_wanted = [&](const string& name) { return name == o.kernel || name.compare(0, o.kernel.size() + 1, o.kernel + "<") == 0; };
    // "kernel scale<float, 2>, block ..." and "kernel scale<float, 2>: ..."
    auto is_of = [&](const string& text) {
        if (text.compare(0, 7, "kernel ")) return false;
        int angles = 0;
        size_t end = 7;
        while (end < text.size() && (angles || (text[end] != ',' && text.compare(end, 2, ": ")))) angles += (text[end] == '<') - (text[end] == '>'), end++;
        return is_wanted(text.substr(7, end - 7));
    };
    std::ifstream lines(report);
    for (string line; std::getline(lines, line);) {
        const size_t space = line.find(' ');
        const string kind = line.substr(0, space), text = line.substr(space + 1);
        if (kind == "launched") run.launched.insert(text);
        else if (o.kernel.empty() || is_of(text)) run.findings.push_back(text);
    }
    if (!o.kernel.empty() && std::none_of(run.launched.begin(), run.launched.end(), is_wanted)) run.findings.push_back("kernel " + o.kernel + ": was never run");
    return run;
}

// ---- reports ----------------------------------------------------------------------------------------

static string escaped(const string& text, bool xml) {
    string out;
    for (char c : text) {
        if (xml && c == '&') out += "&amp;";
        else if (xml && c == '<') out += "&lt;";
        else if (xml && c == '"') out += "&quot;";
        else if (!xml && (c == '"' || c == '\\')) out += string("\\") + c;
        else if ((unsigned char)c < 32) out += ' ';
        else out += c;
    }
    return out;
}

// A report that cannot be written is known before the work.
static FILE* claimed(const char* option, const string& path) {
    FILE* file = path.empty() ? nullptr : fopen(path.c_str(), "w");
    if (!file && !path.empty()) throw Impossible{string("simt-check: ") + option + " " + path + ": cannot be written: " + strerror(errno)};
    return file;
}

struct Reports {
    const Options& options;
    FILE* junit = claimed("--junit", options.junit);
    FILE* sarif = claimed("--sarif", options.sarif);

    void write(const vector<Run>& runs, const string& impossible) const;
};

static string junit_of(const Options& o, const vector<Run>& runs, const string& impossible) {
    std::ostringstream f;
    size_t failures = 0;
    for (const Run& r : runs) failures += !r.findings.empty() || !r.failure.empty();
    f << "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"simt-check\" tests=\"" << runs.size() + !impossible.empty() << "\" failures=\"" << failures
      << "\" errors=\"" << !impossible.empty() << "\">\n";
    auto begin = [&](const string& name, double seconds) {
        f << "  <testcase classname=\"" << escaped(o.sources[0], true) << "\" name=\"" << name << "\" time=\"" << seconds << "\">";
    };
    for (const Run& r : runs) {
        begin(r.name(), r.seconds);
        for (const string& finding : r.findings) f << "<failure message=\"" << escaped(finding, true) << "\"/>";
        if (r.findings.empty() && !r.failure.empty()) f << "<failure message=\"" << escaped(r.failure, true) << "\"/>";
        f << "</testcase>\n";
    }
    if (!impossible.empty()) begin("compile", 0), f << "<error message=\"" << escaped(impossible, true) << "\"/></testcase>\n";
    f << "</testsuite>\n";
    return f.str();
}

// The kinds of findings, by what is in their texts; the first that fits.
struct Rule {
    const char *id, *description;
    vector<const char*> texts;
};
static const vector<Rule> kRules = {
    {"program", "main() failed: returned another number than 0, or was ended", {"main() returned", "main() was ended"}},
    {"compile", "A file that cannot be compiled or found", {"error: ", "simt-check: "}},
    {"unknown-ptx", "Inline PTX that the emulator does not know", {"inline PTX"}},
    {"missing-fence", "Shared memory that wgmma or a bulk copy meets without a proxy fence", {"missing proxy fence"}},
    {"asynchronous-copy", "A copy or product in flight that nobody has waited for", {"is still writing", "in flight", "while wgmma", "no wgmma_wait", "no mbarrier_wait"}},
    {"race", "Two accesses, a write among them, that nothing orders", {"race: ", "race between blocks: ", "race between blocks of a cluster: ", "race between launches: "}},
    {"uninitialised", "A read of memory that nobody has written", {"that nobody has written"}},
    {"deadlock", "Threads that wait for each other or for threads that do not come", {"divergent ", "mixed barriers", "mixed collectives", "deadlock", "waits for a lane", "main() did not end"}},
    {"launch", "A launch or a call that a device refuses", {"bytes of dynamic shared memory", "bytes of static", "a block of", "a grid of", "was never run", "bytes of arguments", "cudaMem", "cudaLaunch", "cudaFree", "cudaEvent", "cudaDevice"}},
    {"misaligned", "An address that is not a multiple of what the access needs", {"misaligned", "not aligned", "not a multiple of"}},
    {"constant", "A write to a __constant__ variable", {"of the __constant__ variable"}},
    {"out-of-bounds", "An access beyond an array, an allocation or a device's memory", {"out of bounds", "out of the array's bounds", "illegal access", "not in shared memory"}},
    {"warp-mask", "A warp-wide operation with a mask that does not fit the lanes", {"shuffle: lane", "in its mask"}},
    {"stack-overflow", "More local memory than a thread has", {"stack overflow"}},
    {"arithmetic", "A division by zero, a shift or a conversion that is not defined", {"integer division by zero", "shift by", "conversion out of range"}},
    {"assertion", "An assertion or a trap of the kernel", {"assertion failed", "__trap()"}},
    {"cluster", "A wrong use of a cluster's barrier or of another block's shared memory", {"cluster", "another block's"}},
    {"hopper", "A wrong use of mbarriers, bulk copies, wgmma or named barriers", {"mbarrier", "wgmma", "bulk", "named_", "tensor map"}},
    {"other", "Another error in a kernel", {""}},
};

static const Rule& rule_of(const string& finding) {
    for (const Rule& r : kRules)
        for (const char* text : r.texts)
            if (finding.find(text) != finding.npos) return r;
    return kRules.back();
}

// The file and the line of "kernel k, block (0,0,0), thread (1,0,0), file.cu:12, called at ...: what", or of "file.cu:12:5: error: what".
static std::pair<string, int> place_of(const string& finding) {
    const size_t thread = finding.find("thread ("), behind = finding.find("), ", thread), begin = thread == finding.npos ? 0 : behind + 3;
    const size_t colon = finding.find(':', begin);
    const bool found = colon != finding.npos && (thread == finding.npos ? finding.find("error: ") != finding.npos : behind != finding.npos);
    return {found ? finding.substr(begin, colon - begin) : "", found ? atoi(finding.c_str() + colon + 1) : 0};
}

static string sarif_of(const std::set<string>& findings) {
    std::ostringstream f;
    f << R"({"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [{"tool": {"driver": {"name": "simt-check", "rules": [)";
    for (const Rule& r : kRules)
        f << (&r == &kRules[0] ? "" : ",") << "\n{\"id\": \"" << r.id << "\", \"shortDescription\": {\"text\": \"" << r.description << "\"}}";
    f << "\n]}}, \"results\": [";
    bool first = true;
    for (const string& finding : findings) {
        const auto [file, line] = place_of(finding);
        f << (first ? "" : ",") << "\n{\"ruleId\": \"" << rule_of(finding).id << "\", \"level\": \"error\", \"message\": {\"text\": \"" << escaped(finding, false) << "\"}";
        if (line > 0)
            f << ", \"locations\": [{\"physicalLocation\": {\"artifactLocation\": {\"uri\": \"" << escaped(file, false) << "\"}, \"region\": {\"startLine\": " << line << "}}}]";
        f << "}";
        first = false;
    }
    f << "\n]}]}\n";
    return f.str();
}

void Reports::write(const vector<Run>& runs, const string& impossible) const {
    std::set<string> all;
    for (const Run& r : runs) {
        all.insert(r.findings.begin(), r.findings.end());
        if (r.findings.empty() && !r.failure.empty()) all.insert(r.failure);
    }
    // Of what a compiler says, the lines with errors; of other reasons, all.
    std::istringstream lines(impossible);
    for (string line; std::getline(lines, line);)
        if (rule_of(line).id == string("compile")) all.insert(line);
    if (!impossible.empty() && all.empty()) all.insert("simt-check: " + impossible);
    if (junit) fputs(junit_of(options, runs, impossible).c_str(), junit), fclose(junit);
    if (sarif) fputs(sarif_of(all).c_str(), sarif), fclose(sarif);
}

// Into `runs`, as far as it comes.
static int check(const Options& o, vector<Run>& runs) {
    for (const string& s : o.sources)
        if (!fs::exists(s)) usage("no file " + s);
    string temporary = "/tmp/simt-check-XXXXXX";
    if (o.keep.empty() && !mkdtemp(temporary.data())) usage("cannot make a directory in /tmp");
    Compiler compiler{o, home(), {}, getenv("CXX") ? getenv("CXX") : "c++"};
    compiler.directory = fs::absolute(o.keep.empty() ? temporary : o.keep);
    fs::create_directories(compiler.directory);
    compiler.shared = cache(compiler.directory);
    struct Cleaner {
        string path;
        ~Cleaner() { if (!path.empty()) fs::remove_all(path); }
    } cleaner{o.keep.empty() ? temporary : ""};
    const vector<fs::path> libraries = compiler.libraries(o.library);
    if (!o.library.empty()) return 0;

    for (size_t b = 0; b < libraries.size(); b++)
        for (const string& order : o.orders)
            for (int seed = order == "random" ? 1 : 0; seed <= (order == "random" ? o.seeds : 0); seed++) {
                Run wanted;
                wanted.build = o.builds[b], wanted.order = order, wanted.seed = seed;
                runs.push_back(execute(o, libraries[b], wanted, compiler.directory / "report"));
            }
    std::set<string> kernels, all;
    bool failed = false;
    for (const Run& r : runs) {
        kernels.insert(r.launched.begin(), r.launched.end());
        all.insert(r.findings.begin(), r.findings.end());
        failed |= !r.failure.empty();
        printf("%-20s %s\n", r.name().c_str(), !r.findings.empty() ? r.findings[0].c_str() : !r.failure.empty() ? r.failure.c_str() : "ok");
    }
    printf("simt-check: %zu kernels, %zu runs, %zu findings\n", kernels.size(), runs.size(), all.size());
    return !all.empty() ? 1 : failed ? 2 : 0;
}

int main(int argc, char** argv) {
    auto say = [](const Impossible& e) {
        fprintf(stderr, "%s%s", e.why.c_str(), e.why.empty() || e.why.back() == '\n' ? "" : "\n");
        return 3;
    };
    try {
        const Options options = parse(argc, argv);
        const Reports reports{options};
        vector<Run> runs;
        string impossible;
        int code;
        try {
            code = check(options, runs);
        } catch (const Impossible& e) {
            impossible = e.why, code = say(e);
        }
        reports.write(runs, impossible);
        return code;
    } catch (const Impossible& e) {
        return say(e);
    }
}
