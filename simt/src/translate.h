// The source step of simt-check, on the output of the preprocessor: what a C++ compiler cannot read becomes calls.
//
//   kernel<<<grid, block>>>(a, b)       simt::launch("kernel", simt::Config(grid, block), [=](auto... p) { kernel(p...); }, a, b)
//   asm("cp.async...", ...)             the emulator's twins of PTX instructions
//   extern __shared__ float s[];        extern __shared__ float s[] asm("smem");
//                                       in a template: a reference to the block's dynamic shared memory
//   threadIdx.x                         simt::view()->thread.x
//   __constant__ float taps[7];         the same, and a line that says where it is
//
// Lines stay where they are, and headers of the system and of simt as they are.
#pragma once
#include <algorithm>
#include <cctype>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

namespace translate {

using std::string;

struct Result {
    string text;
    std::vector<string> unknown;  // "file:line: instruction", of PTX that has no twin
    bool special_functions = false;  // whether it may call some of C++17's
};

inline bool is_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

inline string trim(const string& s) {
    const size_t a = s.find_first_not_of(" \t\n"), b = s.find_last_not_of(" \t\n");
    return a == s.npos ? "" : s.substr(a, b - a + 1);
}

// Behind the literal that begins at i.
inline size_t skip_literal(const string& s, size_t i) {
    const char quote = s[i++];
    while (i < s.size() && s[i] != quote) i += s[i] == '\\' ? 2 : 1;
    return i + 1;
}

// Whether a literal begins at i: not where 0xdead'beef has a separator.
inline bool is_literal(const string& s, size_t i) {
    if (s[i] != '\'') return s[i] == '"';
    size_t begin = i;
    while (begin && (is_word(s[begin - 1]) || s[begin - 1] == '\'')) begin--;
    return begin == i || !isdigit((unsigned char)s[begin]) || i + 1 >= s.size() || !is_word(s[i + 1]);
}

// Behind the bracket that closes the one at i.
inline size_t skip_brackets(const string& s, size_t i) {
    int depth = 0;
    while (i < s.size()) {
        const char c = s[i];
        if (is_literal(s, i)) {
            i = skip_literal(s, i);
            continue;
        }
        depth += c == '(' || c == '[' || c == '{';
        depth -= c == ')' || c == ']' || c == '}';
        i++;
        if (!depth) return i;
    }
    return s.size();
}

// Parts of s between separators outside of brackets and literals.
inline std::vector<string> split(const string& s, char separator) {
    std::vector<string> parts(1);
    for (size_t i = 0; i < s.size();) {
        size_t end = i + 1;
        if (is_literal(s, i)) end = skip_literal(s, i);
        else if (s[i] == '(' || s[i] == '[' || s[i] == '{') end = skip_brackets(s, i);
        else if (s[i] == ':' && separator == ':' && i + 1 < s.size() && s[i + 1] == ':' ) {
            // `::` is two empty sections of asm, or a scope: a name before it says which.
            size_t before = parts.back().find_last_not_of(" \t\n");
            if (before != string::npos && is_word(parts.back()[before])) end = i + 2;
        }
        if (end == i + 1 && s[i] == separator) parts.emplace_back();
        else parts.back() += s.substr(i, end - i);
        i = end;
    }
    return parts;
}

// ---- PTX --------------------------------------------------------------------------------------------

// One asm statement: its instructions become C++ statements on its operands.
class Ptx {
    std::vector<string> operands;  // expressions, outputs first
    std::map<string, string> names;  // [name] operands
    string declarations, code;
    std::set<string> labels, passed;  // all, and those that are before this place
    mutable string unknown;

    static string label_name(const string& text) {
        string name = "simt_at_";
        for (char c : text) name += is_word(c) ? c : '_';
        return name;
    }

    static string text_of(const string& literals) {
        string text;
        for (size_t i = 0; i < literals.size();) {
            if (literals[i] != '"') { i++; continue; }
            const size_t end = skip_literal(literals, i);
            for (size_t k = i + 1; k + 1 < end; k++) {
                if (literals[k] != '\\') { text += literals[k]; continue; }
                text += literals[++k] == 'n' ? '\n' : literals[k] == 't' ? ' ' : literals[k];
            }
            i = end;
        }
        return text;
    }

    static string without_comments(string text) {
        for (const auto& [begin, end] : {std::pair<string, string>("/*", "*/"), {"//", "\n"}})
            for (size_t at; (at = text.find(begin)) != text.npos;) {
                const size_t stop = text.find(end, at);
                text.replace(at, stop == text.npos ? text.npos : stop + end.size() - at, " ");
            }
        return text;
    }

    void add_operands(const string& section) {
        for (const string& part : split(section, ',')) {
            const size_t open = part.find('(');
            if (open == part.npos) continue;
            const size_t name = part.find('[');
            if (name < open) names[part.substr(name + 1, part.find(']') - name - 1)] = std::to_string(operands.size());
            operands.push_back("(" + part.substr(open + 1, part.rfind(')') - open - 1) + ")");
        }
    }

    string value(string token) const {
        token = trim(token);
        static const std::map<string, string> special = {
            {"laneid", "uint32_t(simt::lane())"}, {"warpid", "(simt::view()->thread.x / 32)"}, {"smid", "0u"}, {"nsmid", "4u"},
            {"clock", "uint32_t(clock64())"}, {"clock64", "uint64_t(clock64())"}, {"globaltimer", "uint64_t(clock64())"},
            {"lanemask_eq", "(1u << simt::lane())"}, {"lanemask_lt", "((1u << simt::lane()) - 1)"}, {"lanemask_le", "(~0u >> (31 - simt::lane()))"},
            {"lanemask_gt", "~(~0u >> (31 - simt::lane()))"}, {"lanemask_ge", "~((1u << simt::lane()) - 1)"}};
        static const std::map<string, string> vectors = {{"tid", "thread"}, {"ntid", "block_dim"}, {"ctaid", "block"}, {"nctaid", "grid_dim"}};
        if (token[0] == '%') {
            const string name = token.substr(token.find_first_not_of('%'));
            if (isdigit((unsigned char)name[0])) return size_t(stoi(name)) < operands.size() ? operands[stoi(name)] : "0";
            if (name[0] == '[') {
                auto it = names.find(name.substr(1, name.size() - 2));
                return it == names.end() ? "0" : operands[stoi(it->second)];
            }
            if (name.size() > 2 && name[name.size() - 2] == '.')
                if (const auto v = vectors.find(name.substr(0, name.size() - 2)); v != vectors.end()) return "(simt::view()->" + v->second + "." + name.back() + ")";
            auto it = special.find(name);
            if (it == special.end() && declarations.find(" simt_" + name + " ") == declarations.npos) unknown = token;
            return it == special.end() ? "simt_" + name : it->second;
        }
        if (isdigit((unsigned char)token[0]) || token[0] == '-') {
            if (token.compare(0, 2, "0f") == 0 || token.compare(0, 2, "0F") == 0) return "__uint_as_float(0x" + token.substr(2) + "u)";
            return token;
        }
        return "simt_" + token;
    }
    // {a, b} or a.
    std::vector<string> list(string token) const {
        token = trim(token);
        if (token[0] == '{') token = token.substr(1, token.size() - 2);
        std::vector<string> values;
        for (const string& t : split(token, ',')) values.push_back(value(t));
        return values;
    }
    // [a] or [a + 16], in bytes
    string address(string token) const {
        token = trim(token);
        token = token.substr(1, token.size() - 2);
        const size_t plus = token.find('+');
        return plus == token.npos ? value(token) : "(simt::register_as<uint64_t>(" + value(token.substr(0, plus)) + ") + " + trim(token.substr(plus + 1)) + ")";
    }
    static string joined(const std::vector<string>& values) {
        string text;
        for (const string& v : values) text += (text.empty() ? "" : ", ") + v;
        return text;
    }
    static bool has(const string& op, const char* part) {
        for (const string& p : split(op, '.'))
            if (p == part) return true;
        return false;
    }
    static string assign(const std::vector<string>& to, const string& array) {
        string text;
        for (size_t i = 0; i < to.size(); i++) text += to[i] + " = " + array + "[" + std::to_string(i) + "]; ";
        return text;
    }
    // The C++ type of an instruction's last part.
    static string type_of(const string& op) {
        static const std::map<string, string> types = {{"f32", "float"}, {"f64", "double"}, {"b64", "uint64_t"}, {"u64", "uint64_t"},
            {"s64", "int64_t"}, {"b32", "uint32_t"}, {"u32", "uint32_t"}, {"s32", "int32_t"}, {"b16", "uint16_t"}, {"u16", "uint16_t"},
            {"s16", "int16_t"}, {"b8", "uint8_t"}, {"u8", "uint8_t"}, {"s8", "int8_t"}, {"pred", "bool"}, {"f16x2", "__half2"}, {"bf16x2", "__nv_bfloat162"}};
        const std::vector<string> parts = split(op, '.');
        auto it = types.find(parts.back());
        return it == types.end() ? "" : it->second;
    }

    // Whether each part of an operation is one that its translation heeds, or one that changes no value here.
    static bool understood(const std::vector<string>& parts) {
        static const string types = " f32 f64 b64 u64 s64 b32 u32 s32 b16 u16 s16 b8 u8 s8 ";
        static const string memory = " global shared shared::cta const local volatile relaxed acquire release weak cta gpu sys ca cg cs cv lu wb wt nc v2 v4 ";
        static const string atomic = " global shared shared::cta relaxed acquire release acq_rel cta gpu sys noftz f16x2 bf16x2 add exch cas min max and or xor inc dec ";
        static const string half2 = " f16x2 bf16x2 rn ", rounding = " rn rz rm rp ftz sat ";
        static const std::map<string, string> known = {{"add", rounding + half2}, {"sub", rounding + half2}, {"mul", "lo hi wide" + rounding + half2},
            {"fma", rounding + half2}, {"mad", "lo wide" + rounding}, {"div", "approx full" + rounding}, {"rem", ""}, {"min", "NaN ftz" + half2}, {"max", "NaN ftz" + half2},
            {"setp", "eq ne lt le gt ge lo ls hi hs neu ftz and or xor"}, {"ex2", "approx ftz"}, {"lg2", "approx ftz"}, {"rcp", "approx" + rounding},
            {"sqrt", "approx" + rounding}, {"rsqrt", "approx ftz"}, {"tanh", "approx"}, {"sin", "approx ftz"}, {"cos", "approx ftz"}, {"abs", "ftz" + half2},
            {"neg", "ftz" + half2}, {"and", "pred"}, {"or", "pred"}, {"xor", "pred"}, {"not", "pred"}, {"shl", ""}, {"shr", ""}, {"prmt", ""}, {"selp", ""},
            {"mov", "pred"}, {"popc", ""}, {"brev", ""}, {"clz", ""}, {"bfind", ""}, {"lop3", ""}, {"bfe", ""}, {"bfi", ""}, {"shf", "l r wrap clamp"}, {"sad", ""},
            {"dp4a", ""}, {"mul24", "lo"}, {"ld", memory}, {"st", memory}, {"atom", atomic}, {"red", atomic}, {"shfl", "sync idx up down bfly"},
            {"vote", "sync all any uni ballot pred"}, {"match", "sync any all"}, {"redux", "sync add min max and or xor"}, {"activemask", ""},
            {"cvt", "f16 bf16 f16x2 bf16x2 rni rzi rmi rpi" + rounding}, {"ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"}};
        const auto it = known.find(parts[0]);
        if (it == known.end()) return true;
        const string all = types + " " + it->second + " ";
        for (size_t i = 1; i < parts.size(); i++)
            if (parts[i].find("L1::") && parts[i].find("L2::") && all.find(" " + parts[i] + " ") == all.npos) return false;
        return true;
    }

    // p or !p
    string predicate(string token) const {
        token = trim(token);
        return token[0] == '!' ? "!" + value(token.substr(1)) : value(token);
    }
    string pointer_of(const string& op, const string& token) const {
        const string at = address(token);
        return has(op, "shared") || has(op, "shared::cta") ? "simt::shared_pointer(uint32_t(" + at + "))" : "(void*)(" + at + ")";
    }
    static string fence_of(const string& op) { return has(op, "cta") ? "simt::fence(false);" : "simt::fence();"; }
    static string mode_of(const string& op) { return has(op, "rz") ? "rz" : has(op, "rm") ? "rd" : has(op, "rp") ? "ru" : "rn"; }

    // Of floats, with a rounding mode or `.sat`; and whole numbers with `.sat`.
    string arithmetic(const string& op, const std::vector<string>& a) const {
        static const std::map<string, string> names = {{"add", "add"}, {"sub", "sub"}, {"mul", "mul"}, {"fma", "fma"}, {"mad", "fma"}, {"div", "div"}, {"rcp", "rcp"}, {"sqrt", "sqrt"}};
        const auto it = names.find(split(op, '.')[0]);
        const string type = type_of(op), mode = mode_of(op);
        const bool saturates = has(op, "sat");
        if (it == names.end() || a.size() < 2 || (mode == "rn" && !saturates)) return "";
        string arguments;
        for (size_t i = 1; i < a.size(); i++) arguments += (i > 1 ? ", " : "") + string("simt::register_as<") + type + ">(" + value(a[i]) + ")";
        string result;
        if (type == "float") result = (it->second == "fma" ? "__fmaf_" : "__f" + it->second + "_") + mode + "(" + arguments + ")";
        if (type == "double" && !saturates) result = (it->second == "fma" ? "__fma_" : "__d" + it->second + "_") + mode + "(" + arguments + ")";
        if (type == "float" && saturates) result = "__saturatef(" + result + ")";
        if (type == "int32_t" && saturates && (it->second == "add" || it->second == "sub"))
            result = "simt::clamped<int32_t>(int64_t(simt::register_as<int32_t>(" + value(a[1]) + "))" + (it->second == "add" ? " + " : " - ") + "simt::register_as<int32_t>(" + value(a[2]) + "))";
        return result.empty() ? "" : "simt::set_register(" + value(a[0]) + ", " + result + ");";
    }

    // What sets the carry (`.cc`) or takes it (`addc`): it is the thread's, from one asm statement to the next.
    string carried(const std::vector<string>& parts, const std::vector<string>& a) const {
        static const string names = " add addc sub subc mad madc ";
        const string &name = parts[0], type = type_of("x." + parts.back());
        const bool takes = name.back() == 'c', product = name[0] == 'm', sets = parts[parts.size() - 2] == "cc";
        const size_t modifiers = (product ? 2 : 1) + sets;
        if (names.find(" " + name + " ") == string::npos || !(takes || sets) || type.find("int") == string::npos) return "";
        if (parts.size() != modifiers + 1 || a.size() != (product ? 4 : 3) || (product && parts[1] != "lo" && parts[1] != "hi")) return "";
        auto bits = [&](size_t i) { return "simt::register_as<" + type + ">(" + value(a[i]) + ")"; };
        const string first = product ? "simt::product_" + parts[1] + "(" + bits(1) + ", " + bits(2) + ")" : bits(1);
        return "simt::set_register(" + value(a[0]) + ", simt::" + (name[0] == 's' ? "subtracted" : "added") + "(" + first + ", " + bits(product ? 3 : 2) + ", " +
               (takes ? "true, " : "false, ") + (sets ? "true));" : "false));");
    }

    // cvt.mode.to.from
    string conversion(const std::vector<string>& parts, const std::vector<string>& a) const {
        if (parts.size() < 3 || a.size() < 2) return "";
        const string to = parts[parts.size() - 2], from = parts.back();
        string mode, op;
        for (const string& p : parts) {
            op += (op.empty() ? "" : ".") + p;
            if (&p < &parts[parts.size() - 2] && (p == "rni" || p == "rzi" || p == "rmi" || p == "rpi")) mode = p;
        }
        const bool saturates = has(op, "sat");
        const string nearest = mode_of(op);  // of a float
        auto done = [&](const string& expression) { return "simt::set_register(" + value(a[0]) + ", " + expression + ");"; };
        auto narrow = [&](const string& x, const string& kind, const string& of) {
            return "simt::bit_cast<uint16_t>(__" + of + "2" + (kind[0] == 'b' ? "bfloat16" : "half") + "_" + nearest + "(" + x + "))";
        };
        if (to == "f16x2" || to == "bf16x2")
            return a.size() != 3 || from != "f32" || saturates ? "" : done("uint32_t(" + narrow(value(a[2]), to, "float") + " | uint32_t(" + narrow(value(a[1]), to, "float") + ") << 16)");
        if (a.size() != 2) return "";
        static const std::map<string, string> integers = {{"s32", "int"}, {"u32", "uint"}, {"s64", "ll"}, {"u64", "ull"}, {"s16", "short"}, {"u16", "ushort"}};
        const bool to_float = to[0] == 'f' || to[0] == 'b', from_float = from[0] == 'f' || from[0] == 'b';
        const string to_type = type_of("x." + to);
        // 16 bits become a float, which holds them exactly.
        const string source = from == "f16" ? "simt::half_to_float(uint16_t(" + value(a[1]) + "))" : from == "bf16" ? "__uint_as_float(uint32_t(uint16_t(" + value(a[1]) + ")) << 16)"
                            : "simt::register_as<" + type_of("x." + from) + ">(" + value(a[1]) + ")";
        if (!to_float && !from_float) return done(saturates ? "simt::clamped<" + to_type + ">(" + source + ")" : to_type + "(" + source + ")");
        static const std::map<string, string> whole = {{"rni", "nearbyint"}, {"rzi", "trunc"}, {"rmi", "floor"}, {"rpi", "ceil"}};
        const auto rounded = whole.find(mode);
        if (!to_float) return rounded == whole.end() ? "" : done("simt::saturate<" + to_type + ", " + (from == "f64" ? "double" : "float") + ">(" + rounded->second + "(double(" + source + ")))");
        if (!from_float) {
            const auto it = integers.find(from);
            if (it == integers.end() || saturates) return "";
            if (to == "f16" || to == "bf16") return done(narrow(source, to, it->second));
            if (from == "s16" || from == "u16" || (to == "f64" && from[1] == '3')) return done((to == "f32" ? "float(" : "double(") + source + ")");
            return done("__" + it->second + "2" + (to == "f32" ? "float_" : "double_") + nearest + "(" + source + ")");
        }
        if (rounded != whole.end()) return to == from && (to == "f32" || to == "f64") && !saturates ? done(rounded->second + (to == "f32" ? "f(" : "(") + source + ")") : "";
        if (to == "f32") {
            const string single = from == "f64" ? "__double2float_" + nearest + "(" + source + ")" : source;
            return done(saturates ? "__saturatef(" + single + ")" : single);
        }
        if (saturates) return "";
        if (to == "f64") return done("double(" + source + ")");
        if (from == "f64") return nearest != "rn" ? "" : done(string("simt::bit_cast<uint16_t>(__double2") + (to == "f16" ? "half" : "bfloat16") + "(" + source + "))");
        return done(narrow(source, to, "float"));
    }

    string atomic(const string& op, const std::vector<string>& parts, const std::vector<string>& a) const {
        static const std::map<string, string> calls = {{"add", "atomicAdd"}, {"exch", "atomicExch"}, {"cas", "atomicCAS"}, {"min", "atomicMin"}, {"max", "atomicMax"},
            {"and", "atomicAnd"}, {"or", "atomicOr"}, {"xor", "atomicXor"}, {"inc", "atomicInc"}, {"dec", "atomicDec"}};
        static const std::map<string, string> types = {{"u32", "unsigned"}, {"b32", "unsigned"}, {"s32", "int"}, {"u64", "unsigned long long"}, {"b64", "unsigned long long"},
            {"s64", "unsigned long long"}, {"f32", "float"}, {"f64", "double"}, {"f16x2", "__half2"}, {"bf16x2", "__nv_bfloat162"}, {"b16", "unsigned short"}};
        const auto t = types.find(parts.back());
        const bool returns = parts[0] == "atom";
        const size_t first = returns ? 2 : 1;
        if (t == types.end() || a.size() < first + 1) return "";
        const string call = [&] {
            for (const string& p : parts)
                if (const auto it = calls.find(p); it != calls.end()) return it->second;
            return string();
        }();
        const bool extreme = call == "atomicMin" || call == "atomicMax";
        if (call.empty() || (call == "atomicCAS") != (a.size() == first + 2)) return "";
        if (t->first == "b16" ? call != "atomicCAS" : (t->second[0] == '_' || t->second == "float" || t->second == "double") && call != "atomicAdd" && (call != "atomicExch" || t->first != "f32")) return "";
        const string type = t->first == "s64" && extreme ? "long long" : t->second;
        string arguments;
        for (size_t i = first; i < a.size(); i++)
            arguments += ", " + (type[0] == '_' ? "simt::bit_cast<" + type + ">(uint32_t(" + value(a[i]) + "))" : "simt::register_as<simt::Plain<" + type + ">>(" + value(a[i]) + ")");
        const bool releases = has(op, "release") || has(op, "acq_rel");
        const string text = (releases ? fence_of(op) + " " : "") + "const auto simt_old = " + call + "((" + type + "*)" + pointer_of(op, a[first - 1]) + arguments + "); ";
        if (!returns || trim(a[0]) == "_") return text;
        return text + "simt::set_register(" + value(a[0]) + ", " + (type[0] == '_' ? "simt::bit_cast<uint32_t>(simt_old)" : "simt_old") + ");";
    }

    // The fourth operand holds 32 less the width, and which lane is the last.
    string shuffle(const string& op, const std::vector<string>& a) const {
        const string last = trim(a[3]);
        const bool up = has(op, "up");
        if (isdigit((unsigned char)last[0]) && (strtoul(last.c_str(), nullptr, 0) & 31) != (up ? 0 : 31)) return "";
        const std::vector<string> to = split(a[0], '|');
        const string call = has(op, "idx") ? "__shfl_sync" : up ? "__shfl_up_sync" : has(op, "down") ? "__shfl_down_sync" : "__shfl_xor_sync";
        string text = "const unsigned simt_by = " + value(a[2]) + "; const int simt_width = 32 - (" + value(a[3]) + " >> 8 & 31), simt_lane = simt::lane() % simt_width; ";
        const string source = has(op, "idx") ? "true" : up ? "simt_lane >= int(simt_by)" : has(op, "down") ? "simt_lane + int(simt_by) < simt_width" : "(simt_lane ^ int(simt_by)) < simt_width";
        text += "const uint32_t simt_v = " + call + "(" + value(a[4]) + ", simt::register_as<uint32_t>(" + value(a[1]) + "), simt_by, simt_width); ";
        text += "simt::set_register(" + value(to[0]) + ", simt_v); ";
        return text + (to.size() > 1 ? value(to[1]) + " = " + source + ";" : "");
    }

    // The C++ of one instruction, or nothing if there is none.
    string instruction(const string& op, const std::vector<string>& a) const {
        const std::vector<string> parts = split(op, '.');
        const string& name = parts[0];
        const string type = type_of(op);
        const auto n = a.size();
        if (const string with_carry = carried(parts, a); !with_carry.empty()) return with_carry;
        if (!understood(parts)) return "";
        auto bits = [&](size_t i) { return "simt::register_as<" + type + ">(" + value(a[i]) + ")"; };
        auto set = [&](const string& expression) { return "simt::set_register(" + value(a[0]) + ", " + type + "(" + expression + "));"; };
        if (name == "mma" && n == 4 && (has(op, "m16n8k16") || has(op, "m16n8k8")) && (has(op, "f16") || has(op, "bf16"))) {
            if (parts.size() != 10 || (parts[7] != "f16" && parts[7] != "bf16")) return "";
            const bool f32 = parts[6] == "f32";
            std::vector<string> d = list(a[0]), fa = list(a[1]), fb = list(a[2]), c = list(a[3]);
            if (has(op, "m16n8k8")) fa.insert(fa.end(), {"0u", "0u"}), fb.push_back("0u");
            if (fa.size() != 4 || fb.size() != 2 || d.size() != c.size() || d.size() != (f32 ? 4u : 2u)) return "";
            return string(f32 ? "float" : "uint32_t") + " simt_d[] = {" + joined(c) + "}; const uint32_t simt_a[] = {" + joined(fa) +
                   "}, simt_b[] = {" + joined(fb) + "}; simt::mma(simt_d, simt_a, simt_b, {1, 1, simt::Element::" + parts[7] +
                   ", simt::Accumulator::" + parts[6] + "}, {}); " + assign(d, "simt_d");
        }
        if (name == "ldmatrix" && n == 2 && has(op, "m8n8") && has(op, "b16")) {
            const std::vector<string> r = list(a[0]);
            return "uint32_t simt_r[" + std::to_string(r.size()) + "]; const uintptr_t simt_row = uintptr_t(simt::shared_pointer(" +
                   address(a[1]) + ")); simt::ldmatrix(simt_r, &simt_row, 1, " + std::to_string(r.size()) + ", " +
                   (has(op, "trans") ? "true" : "false") + ", {}); " + assign(r, "simt_r");
        }
        if (op == "cp.async.commit_group") return "simt::cp_async_commit();";
        if (op == "cp.async.wait_group") return "simt::cp_async_wait(" + value(a[0]) + ");";
        if (op == "cp.async.wait_all") return "simt::cp_async_commit(); simt::cp_async_wait(0);";
        if (op.compare(0, 10, "cp.async.c") == 0 && n >= 3)
            return "simt::cp_async(simt::shared_pointer(" + address(a[0]) + "), (const void*)(" + address(a[1]) + "), " + value(a[2]) +
                   ", int(" + value(a[n > 3 ? 3 : 2]) + "), {});";
        if (name == "cvta" && n == 2) {
            if (has(op, "shared") && has(op, "to")) return "simt::set_register(" + value(a[0]) + ", uint64_t(simt::shared_offset((const void*)(" + value(a[1]) + "))));";
            if (has(op, "to")) return "simt::set_register(" + value(a[0]) + ", uint64_t(" + value(a[1]) + "));";
        }
        if (name == "cvt") return conversion(parts, a);
        if (name == "atom" || name == "red") return atomic(op, parts, a);
        if (name == "shfl" && (n == 5) && type == "uint32_t") return shuffle(op, a);
        if (name == "vote" && n == 3) {
            const string ballot = "__ballot_sync(" + value(a[2]) + ", " + predicate(a[1]) + ")";
            if (has(op, "ballot")) return "simt::set_register(" + value(a[0]) + ", " + ballot + ");";
            if (has(op, "uni")) return "const uint32_t simt_b = " + ballot + "; " + value(a[0]) + " = simt_b == 0 || simt_b == uint32_t(" + value(a[2]) + ");";
            if (has(op, "all") || has(op, "any")) return value(a[0]) + " = __" + (has(op, "all") ? "all" : "any") + "_sync(" + value(a[2]) + ", " + predicate(a[1]) + ");";
        }
        if (name == "match" && n == 3 && (type == "uint32_t" || type == "uint64_t")) {
            const std::vector<string> to = split(a[0], '|');
            const string word = type == "uint32_t" ? "unsigned(" + bits(1) + ")" : "(unsigned long long)(" + bits(1) + ")";
            if (has(op, "any")) return "simt::set_register(" + value(a[0]) + ", __match_any_sync(" + value(a[2]) + ", " + word + "));";
            return "int simt_all; simt::set_register(" + value(to[0]) + ", __match_all_sync(" + value(a[2]) + ", " + word + ", &simt_all)); " +
                   (to.size() > 1 ? value(to[1]) + " = simt_all != 0;" : "");
        }
        if (name == "redux" && n == 3 && (type == "uint32_t" || type == "int32_t") && parts.size() == 4)
            return set("__reduce_" + parts[2] + "_sync(" + value(a[2]) + ", " + (type[0] == 'u' ? "unsigned(" : "int(") + bits(1) + "))");
        if (name == "activemask" && n == 1) return "simt::set_register(" + value(a[0]) + ", __activemask());";
        if (name == "bfe" && n == 4 && !type.empty()) return set("simt::extracted(" + bits(1) + ", " + value(a[2]) + ", " + value(a[3]) + ")");
        if (name == "bfi" && n == 5 && !type.empty()) return set("simt::inserted(" + bits(1) + ", " + bits(2) + ", " + value(a[3]) + ", " + value(a[4]) + ")");
        if (name == "shf" && n == 4) return set("__funnelshift_" + parts[1] + (has(op, "clamp") ? "c(" : "(") + bits(1) + ", " + bits(2) + ", " + value(a[3]) + ")");
        if (name == "bfind" && n == 2 && type == "uint32_t") return set(bits(1) + " ? 31 - __clz(" + bits(1) + ") : -1");
        if (name == "sad" && n == 4 && (type == "uint32_t" || type == "int32_t")) return set((type[0] == 'u' ? "__usad(" : "__sad(") + bits(1) + ", " + bits(2) + ", " + bits(3) + ")");
        if (name == "dp4a" && n == 4 && parts.size() == 3 && parts[1] == parts[2]) return set("__dp4a(" + string(type[0] == 'u' ? "unsigned(" : "int(") + bits(1) + "), " + bits(2) + ", " + bits(3) + ")");
        if (name == "mul24" && n == 3 && (type == "uint32_t" || type == "int32_t")) return set((type[0] == 'u' ? "__umul24(" : "__mul24(") + bits(1) + ", " + bits(2) + ")");
        if (type == "__half2" || type == "__nv_bfloat162") {
            static const std::map<string, string> pairs = {{"add", "__hadd2"}, {"sub", "__hsub2"}, {"mul", "__hmul2"}, {"fma", "__hfma2"}, {"min", "__hmin2"},
                {"max", "__hmax2"}, {"neg", "__hneg2"}, {"abs", "__habs2"}};
            const auto it = pairs.find(name);
            if (it == pairs.end() || has(op, "sat") || has(op, "ftz") || has(op, "rz") || has(op, "rm") || has(op, "rp")) return "";
            string arguments;
            for (size_t i = 1; i < n; i++) arguments += (i > 1 ? ", " : "") + string("simt::bit_cast<") + type + ">(uint32_t(" + value(a[i]) + "))";
            const bool nan = has(op, "NaN");
            return "simt::set_register(" + value(a[0]) + ", simt::bit_cast<uint32_t>(" + it->second + (nan ? "_nan(" : "(") + arguments + ")));";
        }
        if (const string rounded = arithmetic(op, a); !rounded.empty()) return rounded;
        if (has(op, "sat") || has(op, "rz") || has(op, "rm") || has(op, "rp")) return "";
        if (name == "mov" && n == 2 && (type == "uint32_t" || type == "uint64_t") && (trim(a[0])[0] == '{' || trim(a[1])[0] == '{')) {
            const bool packs = trim(a[1])[0] == '{';
            const std::vector<string> pieces = list(a[packs ? 1 : 0]);
            const size_t size = (type == "uint32_t" ? 32 : 64) / pieces.size();
            if (size != 8 && size != 16 && size != 32) return "";
            const string piece = "uint" + std::to_string(size) + "_t";
            string text;
            for (size_t i = 0; i < pieces.size(); i++) {
                const string by = std::to_string(i * size);
                if (packs) text += (i ? " | " : "") + type + "(simt::register_as<" + piece + ">(" + pieces[i] + ")) << " + by;
                else if (pieces[i] != "simt__") text += " simt::set_register(" + pieces[i] + ", " + piece + "(simt_w >> " + by + "));";
            }
            return packs ? set(text) : "const " + type + " simt_w = " + bits(1) + ";" + text;
        }
        if (name == "mov" && n == 2 && !type.empty() && trim(a[0])[0] != '{' && trim(a[1])[0] != '{') return set(bits(1));
        if (n == 2 && name == "not" && !type.empty()) return set((type == "bool" ? "!" : "~") + bits(1));
        if (n == 2 && (name == "popc" || name == "brev" || name == "clz") && type == "uint32_t") return set("__" + name + "(" + bits(1) + ")");
        if (n == 5 && name == "lop3") return set("simt::lop3(" + bits(1) + ", " + bits(2) + ", " + bits(3) + ", " + value(a[4]) + ")");
        if (n == 3 && name == "mul" && has(op, "hi") && (type == "uint32_t" || type == "int32_t")) return set((type[0] == 'u' ? "__umulhi(" : "__mulhi(") + bits(1) + ", " + bits(2) + ")");
        if (n == 3 && name == "mul" && has(op, "wide") && (type == "uint32_t" || type == "int32_t")) {
            const string wide = type[0] == 'u' ? "uint64_t(" : "int64_t(";
            return "simt::set_register(" + value(a[0]) + ", " + wide + bits(1) + ") * " + wide + bits(2) + "));";
        }
        if (name == "setp" && (n == 3 || n == 4) && !type.empty()) {
            static const std::map<string, string> compare = {{"eq", "=="}, {"ne", "!="}, {"neu", "!="}, {"lt", "<"}, {"le", "<="}, {"gt", ">"}, {"ge", ">="},
                {"lo", "<"}, {"ls", "<="}, {"hi", ">"}, {"hs", ">="}};
            const auto it = compare.find(parts[1]);
            const string with = has(op, "and") ? "&" : has(op, "or") ? "|" : has(op, "xor") ? "^" : "";
            if (it == compare.end() || with.empty() != (n == 3)) return "";
            // A NaN is unequal to nothing, but by neu.
            const bool ordered = parts[1] == "ne" && (type == "float" || type == "double");
            const string result = ordered ? "(" + bits(1) + " < " + bits(2) + " || " + bits(1) + " > " + bits(2) + ")" : "(" + bits(1) + " " + it->second + " " + bits(2) + ")";
            const std::vector<string> to = split(a[0], '|');
            const string third = n == 4 ? " " + with + " " + predicate(a[3]) : "";
            if (to.size() == 1) return value(to[0]) + " = " + result + third + ";";
            return "const bool simt_c = " + result + "; " + value(to[0]) + " = simt_c" + third + "; " + value(to[1]) + " = !simt_c" + third + ";";
        }
        static const std::map<string, string> binary = {{"add", "+"}, {"sub", "-"}, {"and", "&"}, {"or", "|"}, {"xor", "^"}};
        if (auto it = binary.find(name); it != binary.end() && n == 3 && !type.empty()) return set(bits(1) + " " + it->second + " " + bits(2));
        if (name == "mul" && n == 3 && !type.empty() && !has(op, "hi") && !has(op, "wide")) return set(bits(1) + " * " + bits(2));
        if ((name == "shl" || name == "shr") && n == 3 && !type.empty())
            return set("(" + value(a[2]) + ") > sizeof(" + type + ") * 8 - 1 ? " + (name == "shr" && type[0] == 'i' ? bits(1) + " < 0 ? -1 : 0" : "0") + " : " + bits(1) + (name == "shl" ? " << " : " >> ") + "(" + value(a[2]) + ")");
        if ((name == "min" || name == "max") && n == 3 && type == "float" && has(op, "NaN"))
            return set("isnan(" + bits(1) + ") || isnan(" + bits(2) + ") ? NAN : " + name + "(" + bits(1) + ", " + bits(2) + ")");
        if ((name == "min" || name == "max") && n == 3 && !type.empty()) return set(name + "(" + bits(1) + ", " + bits(2) + ")");
        if ((name == "fma" || name == "mad") && n == 4 && type == "float") return set("fmaf(" + bits(1) + ", " + bits(2) + ", " + bits(3) + ")");
        if (name == "fma" && n == 4 && type == "double") return set("fma(" + bits(1) + ", " + bits(2) + ", " + bits(3) + ")");
        if (name == "mad" && n == 4 && has(op, "wide") && (type == "uint32_t" || type == "int32_t")) {
            const string wide = type[0] == 'u' ? "uint64_t" : "int64_t";
            return "simt::set_register(" + value(a[0]) + ", " + wide + "(" + bits(1) + ") * " + wide + "(" + bits(2) + ") + simt::register_as<" + wide + ">(" + value(a[3]) + "));";
        }
        if ((name == "div" || name == "rem") && n == 3 && !type.empty()) return set(bits(1) + (name == "div" ? " / " : " % ") + bits(2));
        if (name == "abs" && n == 2 && type != "float" && !type.empty()) return set("(" + bits(1) + " < 0 ? -" + bits(1) + " : " + bits(1) + ")");
        if ((name == "sqrt" || name == "rcp") && n == 2 && type == "double") return set((name == "sqrt" ? "sqrt(" : "1.0 / (") + bits(1) + ")");
        if (name == "mad" && n == 4 && has(op, "lo")) return set(bits(1) + " * " + bits(2) + " + " + bits(3));
        static const std::map<string, string> functions = {{"ex2", "exp2f"}, {"lg2", "log2f"}, {"rcp", "__frcp_rn"}, {"sqrt", "sqrtf"},
            {"rsqrt", "rsqrtf"}, {"tanh", "tanhf"}, {"sin", "sinf"}, {"cos", "cosf"}, {"abs", "fabsf"}};
        if (auto it = functions.find(name); it != functions.end() && n == 2 && type == "float") return set(it->second + "(" + bits(1) + ")");
        if (name == "neg" && n == 2 && !type.empty()) return set("-" + bits(1));
        if (name == "prmt" && n == 4) return set("simt::prmt(" + value(a[1]) + ", " + value(a[2]) + ", " + value(a[3]) + ")");
        if (name == "selp" && n == 4) return set(value(a[3]) + " ? " + bits(1) + " : " + bits(2));
        if ((name == "ld" || name == "st") && n == 2 && !type.empty()) {
            const string pointer = pointer_of(op, a[name == "ld" ? 1 : 0]);
            const bool is_volatile = has(op, "volatile") || has(op, "relaxed") || has(op, "acquire") || has(op, "release");
            const std::vector<string> values = list(a[name == "ld" ? 0 : 1]);
            const string element_type = is_volatile ? "volatile " + type : type;
            string text = (has(op, "release") ? fence_of(op) + " " : "") + element_type + "* simt_p = (" + element_type + "*)" + pointer + "; ";
            for (size_t i = 0; i < values.size(); i++) {
                const string element = "simt_p[" + std::to_string(i) + "]";
                text += name == "ld" ? "simt::set_register(" + values[i] + ", " + element + "); "
                                     : element + " = simt::register_as<" + type + ">(" + values[i] + "); ";
            }
            return text;
        }
        if (op == "bar.warp.sync" && n == 1) return "__syncwarp(" + value(a[0]) + ");";
        if ((name == "bar" || name == "barrier") && has(op, "arrive") && n == 2)
            return "simt::named_arrive(int(" + value(a[0]) + "), int(" + value(a[1]) + "), {});";
        if ((name == "bar" || name == "barrier") && has(op, "red") && n == 3 && trim(a[1]) == "0") {
            const string call = has(op, "popc") ? "__syncthreads_count(" : has(op, "and") ? "__syncthreads_and(" : has(op, "or") ? "__syncthreads_or(" : "";
            if (!call.empty()) return value(a[0]) + " = " + call + predicate(a[2]) + ");";
        }
        if ((name == "bar" || name == "barrier") && has(op, "sync") && n >= 1) {
            if (n == 1 && trim(a[0]) == "0") return "simt::barrier({});";
            return "simt::named_barrier(int(" + value(a[0]) + "), int(" + (n > 1 ? value(a[1]) : "simt::view()->block_dim.x * simt::view()->block_dim.y * simt::view()->block_dim.z") + "), {});";
        }
        if ((name == "membar" || name == "fence") && !has(op, "proxy")) return fence_of(op);
        if (op == "griddepcontrol.wait") return "simt::wait_for_launches();";
        if (op == "griddepcontrol.launch_dependents") return "simt::let_next_launch_begin();";
        if (name == "prefetch" || name == "prefetchu" || name == "nanosleep") return ";";
        if (name == "trap") return "__trap();";
        return "";
    }

    void statement(string s) {
        s = trim(s);
        while (!s.empty() && (s[0] == '{' || s[0] == '}')) s = trim(s.substr(1));
        while (!s.empty() && s.back() == '}' && s.find('{') == s.npos) s = trim(s.substr(0, s.size() - 1));
        if (s.empty()) return;
        if (const size_t colon = s.find(':'); colon != s.npos && s.find_first_of(" \t\n.,{[") > colon) {
            const string label = label_name(s.substr(0, colon));
            labels.insert(label), passed.insert(label);
            code += label + ":; ";
            return statement(s.substr(colon + 1));
        }
        if (s.compare(0, 4, ".reg") == 0) {
            const size_t kind = s.find('.', 4), after = s.find_first_of(" \t", kind);
            const string type = s.compare(kind, 5, ".pred") == 0 ? "bool" : type_of("x" + s.substr(kind, after - kind));
            for (const string& part : split(s.substr(after), ',')) {
                const string name = trim(part.substr(part.find_first_not_of(" \t%")));
                const size_t angle = name.find('<');  // r<3>: r0, r1 and r2
                for (int i = 0; i < (angle == name.npos ? 1 : atoi(name.c_str() + angle + 1)); i++)
                    declarations += (type.empty() ? "uint64_t" : type) + " simt_" + name.substr(0, angle) + (angle == name.npos ? "" : std::to_string(i)) + " = 0; ";
            }
            return;
        }
        string condition;
        if (s[0] == '@') {
            const size_t space = s.find_first_of(" \t\n");
            string predicate = s.substr(1, space - 1);
            const bool negated = predicate[0] == '!';
            condition = string("if (") + (negated ? "!" : "") + value(negated ? predicate.substr(1) : predicate) + ") ";
            s = trim(s.substr(space));
        }
        const size_t space = s.find_first_of(" \t\n");
        const string op = s.substr(0, space);
        std::vector<string> arguments;
        if (space != s.npos) arguments = split(s.substr(space), ',');
        if ((op == "bra" || op == "bra.uni") && arguments.size() == 1) {
            const string label = label_name(trim(arguments[0]));
            labels.insert(label);
            // A loop may wait for another thread.
            code += condition + "{ " + (passed.count(label) ? "simt::let_others_run(); " : "") + "goto " + label + "; } ";
            return;
        }
        const string translated = instruction(op, arguments);
        if (translated.empty()) unknown = op;
        else code += condition + "{ " + translated + " } ";
    }

public:
    // `text` is what is between asm's parentheses.
    static string translated(const string& text, string& unknown) {
        Ptx ptx;
        const std::vector<string> sections = split(text, ':');
        for (size_t i = 1; i < sections.size() && i < 3; i++) ptx.add_operands(sections[i]);
        const string instructions = without_comments(text_of(sections[0]));
        // Braces of a block are no list: a list follows an operation on its line.
        string flat = trim(instructions);
        if (!flat.empty() && flat[0] == '{') {
            flat = trim(flat.substr(1));
            if (!flat.empty() && flat.back() == '}') flat.pop_back();
        }
        for (const string& s : split(flat, ';')) ptx.statement(s);
        unknown = ptx.unknown;
        if (!unknown.empty())
            return "simt::trap(\"inline PTX that the emulator does not know: " + unknown + "\", {})";
        if (ptx.code.empty()) return "__asm__ __volatile__(\"\" ::: \"memory\")";  // of the host's code: the compiler stops here
        for (const string& label : ptx.labels) {
            if (!ptx.passed.count(label)) return unknown = "bra", "simt::trap(\"inline PTX that the emulator does not know: bra\", {})";
            ptx.declarations = "__label__ " + label + "; " + ptx.declarations;
        }
        return "({ " + ptx.declarations + ptx.code + "})";
    }
};

// ---- sources ------------------------------------------------------------------------------------------

// "cyl_bessel_i", "cyl_bessel_if", ...
inline bool is_special_function(const string& word) {
    static const char* const beginnings[] = {"assoc_l", "beta", "comp_ellint_", "cyl_bessel_", "cyl_neumann", "ellint_", "expint", "hermite",
        "laguerre", "legendre", "riemann_zeta", "sph_"};
    return std::any_of(std::begin(beginnings), std::end(beginnings), [&](const char* b) { return word.compare(0, strlen(b), b) == 0; });
}

enum class Scope { file, in_template, other };

// What is in the braces that open behind `text`. A full specialisation is no template.
inline Scope scope_behind(const string& text) {
    const size_t before = text.find_last_of(";{}");
    const string head = text.substr(before == text.npos ? 0 : before + 1);
    Scope scope = Scope::other;
    for (size_t i = 0, end; i < head.size(); i = end) {
        end = i + 1;
        if (!is_word(head[i])) continue;
        while (end < head.size() && is_word(head[end])) end++;
        const string word = head.substr(i, end - i);
        if (word == "namespace" || (word == "extern" && trim(head.substr(end)).compare(0, 3, "\"C\"") == 0)) scope = Scope::file;
        if (word != "template") continue;
        const size_t open = head.find_first_not_of(" \t\n", end);
        if (open != head.npos && head[open] == '<' && head[head.find_first_not_of(" \t\n", open + 1)] != '>') return Scope::in_template;
    }
    return scope;
}

// What __constant__ is after the preprocessor (simt.h).
static const char kConstantMark[] = "__attribute__((aligned(sizeof(char))))";

// The word that ends before `end`, and begins behind `from`.
inline string word_before(const string& s, size_t from, size_t end) {
    while (end > from && end <= s.size() && !is_word(s[end - 1])) end--;
    size_t begin = std::min(end, s.size());
    while (begin > from && is_word(s[begin - 1])) begin--;
    return s.substr(begin, end - begin);
}

// The names that "Filter filter, taps[7] = {...}" declares.
inline std::vector<string> declared_names(const string& s) {
    std::vector<string> names;
    string word;
    int angles = 0;
    bool initialiser = false, type_body = false;
    for (size_t i = 0; i < s.size();) {
        size_t end = i + 1;
        if (is_word(s[i])) {
            while (end < s.size() && is_word(s[end])) end++;
            const string found = s.substr(i, end - i);
            type_body |= found == "struct" || found == "class" || found == "union" || found == "enum";
            if (found == "__attribute__" || found == "alignas") end = skip_brackets(s, s.find('(', end));
            else if (!angles && !initialiser) word = found;
        } else if (is_literal(s, i)) {
            end = skip_literal(s, i);
        } else if (s[i] == '{' && type_body && !initialiser) {
            end = skip_brackets(s, i), type_body = false;
        } else if (!initialiser && (s[i] == '<' || s[i] == '>')) {
            angles += s[i] == '<' ? 1 : -1;
        } else if (s[i] == '[' || s[i] == '{' || s[i] == '(' || s[i] == '=') {
            if (s[i] != '=') end = skip_brackets(s, i);
            initialiser |= angles == 0;
        } else if (s[i] == ',' && !angles) {
            names.push_back(word), initialiser = false;
        }
        i = end;
    }
    names.push_back(word);
    return names;
}

// Of "extern ... thread_local float s[]": "typedef float simt_of_s[]; simt_of_s& s = ...".
inline string dynamic_reference(const string& declaration) {
    string type;  // without `extern`, `thread_local` and attributes: what is left is type, name and bounds
    for (size_t i = 0; i < declaration.size();) {
        size_t end = i;
        while (end < declaration.size() && is_word(declaration[end])) end++;
        const string word = declaration.substr(i, end - i);
        if (word == "__attribute__" || word == "alignas") i = skip_brackets(declaration, declaration.find('(', i));
        else if (word == "extern" || word == "thread_local") i = end;
        else if (end > i) type += word, i = end;
        else type += declaration[i] == '\n' ? ' ' : declaration[i], i++;
    }
    const size_t bounds = type.find('['), last = type.find_last_not_of(" \t", bounds - 1), first = type.find_last_of(" \t*&", last) + 1;
    if (bounds == type.npos) return declaration;
    const string name = type.substr(first, last + 1 - first);
    const string newlines = string(size_t(std::count(declaration.begin(), declaration.end(), '\n')), '\n');
    return "typedef " + trim(type.substr(0, first)) + " simt_of_" + name + trim(type.substr(bounds)) + "; simt_of_" + name + "& " + name +
           " = *(simt_of_" + name + "*)simt::dynamic_shared()" + newlines;
}

// The bracket that the one at i closes.
inline size_t open_before(const string& s, size_t i) {
    int depth = 0;
    for (;; i--) {
        depth += s[i] == ')' || s[i] == ']';
        depth -= s[i] == '(' || s[i] == '[';
        if (!depth || !i) return i;
    }
}

// "# 12 "file" 3": where the next line is from. Line 0: another directive.
inline bool is_marker(const string& s, size_t i) { return s[i] == '#' && (i == 0 || s[i - 1] == '\n'); }
struct Marker {
    int line = 0;
    string file;
    bool system = false;
    explicit Marker(const string& text) {
        const size_t open = text.find('"'), close = text.rfind('"');
        if (open == close || !isdigit((unsigned char)text[2])) return;
        line = stoi(text.substr(2)), file = text.substr(open + 1, close - open - 1), system = text.find(" 3", close) != text.npos;
    }
};

// Behind the marker, the literal, the word or the character that begins at i.
inline size_t token_end(const string& s, size_t i) {
    size_t end = i + 1;
    if (is_marker(s, i)) {
        end = s.find('\n', i);
    } else if (s[i] == '"' && i && s[i - 1] == 'R') {
        const size_t open = s.find('(', i);
        const string close = ")" + s.substr(i + 1, open - i - 1) + "\"";
        end = s.find(close, open);
        if (end != s.npos) end += close.size();
    } else if (is_literal(s, i)) {
        end = skip_literal(s, i);
    } else {
        while (is_word(s[i]) && end < s.size() && (is_word(s[end]) || (s[end] == '\'' && !is_literal(s, end)))) end++;
    }
    return std::min(end, s.size());
}

// A function's braces and what is in them.
struct Body {
    size_t begin, end;
    int line, last_line, nth;  // of several that begin on the line
    string file;
};

// Whether braces behind this are a function's, and no class's, namespace's or initialiser's.
inline bool is_function_head(string head) {
    for (const char* attribute : {"__attribute__", "alignas"})
        for (size_t at; (at = head.find(attribute)) != head.npos;) {
            const size_t open = head.find('(', at);
            head.erase(at, open == head.npos ? head.npos : skip_brackets(head, open) - at);
        }
    const size_t last = head.rfind(')');
    if (last == head.npos) return false;
    const string behind = head.substr(last);
    for (const char* word : {"class ", "struct ", "union ", "enum ", "namespace ", "="})
        if (behind.find(word) != behind.npos) return false;
    return true;
}

inline std::vector<Body> bodies(const string& s, const std::function<bool(const string&)>& skipped) {
    std::vector<Body> all;
    string file;
    int line = 0;
    bool skip = false;
    for (size_t i = 0, end; i < s.size(); i = end) {
        end = token_end(s, i);
        auto see = [&](size_t at, size_t stop) {
            if (is_marker(s, at)) {
                const Marker marker(s.substr(at, stop - at));
                if (marker.line) line = marker.line - 1, file = marker.file, skip = marker.system || skipped(marker.file);
            } else {
                line += int(std::count(s.begin() + long(at), s.begin() + long(stop), '\n'));
            }
        };
        see(i, end);
        if (skip || s[i] != '{' || !i) continue;
        const size_t before = s.find_last_of(";{}", i - 1), head = before == s.npos ? 0 : before + 1;
        if (!is_function_head(s.substr(head, i - head))) continue;
        Body body = {i, end, line, line, 0, file};
        if (!all.empty() && all.back().line == line && all.back().file == file) body.nth = all.back().nth + 1;
        for (int depth = 1; depth && end < s.size();) {
            const size_t stop = token_end(s, end);
            see(end, stop);
            depth += (s[end] == '{') - (s[end] == '}');
            end = stop;
        }
        body.end = end, body.last_line = line;
        all.push_back(body);
    }
    return all;
}

// Of a file that asks for __CUDA_ARCH__, preprocessed with it and without: where the two differ within a function, it
// does the one on the device and the other on the host. What is outside of functions is the device's.
inline string merged(const string& device, const string& host, const std::function<bool(const string&)>& skipped) {
    auto plain = [](const string& text) {
        string all;
        for (size_t i = 0, end; i < text.size(); i = end) {
            end = token_end(text, i);
            if (!is_marker(text, i) && !isspace((unsigned char)text[i])) all += text.substr(i, end - i) + (is_word(text[i]) ? " " : "");
        }
        return all;
    };
    auto marker = [](int line, const string& file) { return "\n# " + std::to_string(line) + " \"" + file + "\"\n"; };
    std::map<std::tuple<string, int, int>, string> on_host;
    for (const Body& b : bodies(host, skipped)) on_host[{b.file, b.line, b.nth}] = host.substr(b.begin, b.end - b.begin);
    string all;
    size_t done = 0;
    for (const Body& b : bodies(device, skipped)) {
        const auto it = on_host.find({b.file, b.line, b.nth});
        const string here = device.substr(b.begin, b.end - b.begin);
        if (it == on_host.end() || plain(it->second) == plain(here)) continue;
        all += device.substr(done, b.begin - done) + "{ if (!__builtin_is_constant_evaluated() && simt::on_device()) " + here + " else " + marker(b.line, b.file) + it->second +
               "}" + marker(b.last_line, b.file);
        done = b.end;
    }
    return all + device.substr(done);
}

// threadIdx and its like become what they stand for, but where the program has a variable of its own by that name:
// "dim3 gridDim(8), blockDim(32);" hides the built-in one until its braces close.
inline string with_built_in(const string& s, const std::function<bool(const string&)>& skipped) {
    static const std::map<string, string> built_in = {{"threadIdx", "(simt::view()->thread)"}, {"blockIdx", "(simt::view()->block)"},
        {"blockDim", "(simt::view()->block_dim)"}, {"gridDim", "(simt::view()->grid_dim)"}};
    string out;
    bool skip = false;
    int braces = 0, brackets = 0;
    std::vector<bool> values;      // of the open braces: whether there is an initialiser in them
    int initialisers = -1;         // in so many braces: behind the colon of a constructor
    bool no_constructor = false;   // a statement with a question mark, or a case
    std::vector<std::pair<string, int>> hidden;  // in so many braces, and more
    auto end_hiding = [&](int at_least) {
        hidden.erase(std::remove_if(hidden.begin(), hidden.end(), [&](const auto& h) { return h.second >= at_least; }), hidden.end());
    };
    auto is_one_of = [](const string& word, std::initializer_list<const char*> words) {
        return std::any_of(words.begin(), words.end(), [&](const char* w) { return word == w; });
    };
    auto word_before = [&](size_t end) {  // that ends there
        size_t begin = end;
        while (begin && is_word(out[begin - 1])) begin--;
        return out.substr(begin, end - begin);
    };
    // Whether a brace that opens here is an initialiser's. A lambda's, a function's, a class's is none.
    auto opens_values = [&] {
        const size_t last = out.find_last_not_of(" \t\n");
        if (last == out.npos) return false;
        const char c = out[last];
        if (c == '=' || c == ',' || c == '(' || c == '[') return true;
        if (c == '{') return !values.empty() && values.back();
        if (c == ']') {
            const size_t open = open_before(out, last), name = open ? out.find_last_not_of(" \t\n", open - 1) : out.npos;
            return name != out.npos && (is_word(out[name]) || out[name] == ']') && word_before(name + 1) != "return";
        }
        if (!is_word(c) && c != '>') return false;
        if (is_one_of(word_before(last + 1), {"else", "do", "try", "const", "noexcept", "override", "final", "mutable"})) return false;
        const size_t statement = out.find_last_of(";{}");
        const string head = out.substr(statement == out.npos ? 0 : statement + 1);
        for (size_t i = 0, end; i < head.size(); i = end) {
            end = token_end(head, i);
            if (is_one_of(head.substr(i, end - i), {"struct", "class", "union", "enum", "namespace"})) return false;
        }
        // ") -> type {"
        const size_t arrow = head.rfind("->");
        return arrow == head.npos || head.find_first_of("()=?", arrow) != head.npos || split(head.substr(arrow), '<')[0].find(',') != head.npos;
    };
    auto declares = [&](size_t end) {
        const size_t last = out.find_last_not_of(" \t\n"), next = s.find_first_not_of(" \t\n", end);
        if (last == out.npos || next == s.npos || s[next] == '.') return false;
        size_t type = last;  // before a * or a &, which may be operators
        while (type != out.npos && (out[type] == '&' || out[type] == '*')) type = type ? out.find_last_not_of(" \t\n", type - 1) : out.npos;
        if (type == out.npos) return false;
        if (out[type] == ',') {
            if (!values.empty() && values.back()) return false;
            return (type == last && (s[next] == '(' || s[next] == '{' || s[next] == '=')) || (!brackets && (s[next] == ';' || s[next] == ',' || s[next] == '='));
        }
        if (out[type] == '>') return !type || out[type - 1] != '-';
        const string word = word_before(type + 1);
        return !word.empty() && !is_one_of(word, {"return", "case", "else", "do", "throw", "sizeof", "co_return"});
    };
    for (size_t i = 0; i < s.size();) {
        const size_t end = token_end(s, i);
        if (is_marker(s, i)) {
            const Marker marker(s.substr(i, end - i));
            if (marker.line) skip = marker.system || skipped(marker.file);
        } else if (is_word(s[i])) {
            if (!skip && s.compare(i, end - i, "case") == 0) no_constructor = true;
            const auto it = skip ? built_in.end() : built_in.find(s.substr(i, end - i));
            const size_t before = out.find_last_not_of(" \t\n");
            const size_t next = s.find_first_not_of(" \t\n", end);
            // s.gridDim, p->gridDim, and a constructor's ": gridDim(8)"
            const bool member = before != out.npos && (out[before] == '.' || (before && out[before] == '>' && out[before - 1] == '-') ||
                                                       ((out[before] == ':' || (out[before] == ',' && initialisers == braces && !brackets)) &&
                                                        next != s.npos && (s[next] == '(' || s[next] == '{')));
            if (it != built_in.end() && !member) {
                const bool is_hidden = std::any_of(hidden.begin(), hidden.end(), [&](const auto& h) { return h.first == it->first; });
                if (!is_hidden && declares(end)) hidden.emplace_back(it->first, braces + (brackets > 0));  // a parameter, in the function's braces
                else if (!is_hidden) {
                    out += it->second;
                    i = end;
                    continue;
                }
            }
        } else if (!skip) {
            if (s[i] == ':' && !brackets && !no_constructor && initialisers < 0 && i && s[i - 1] != ':' && s[end] != ':') {
                const size_t before = out.find_last_not_of(" \t\n");
                if (before != out.npos && (out[before] == ')' || word_before(before + 1) == "noexcept")) initialisers = braces;
            }
            if (s[i] == '{') {
                const size_t before = out.find_last_not_of(" \t\n");
                const bool body = initialisers == braces && !brackets && before != out.npos && !is_word(out[before]) && out[before] != '>';
                if (body) initialisers = -1;
                values.push_back(!body && opens_values());
            }
            if (s[i] == '}' && !values.empty()) values.pop_back();
            if (s[i] == ';' && initialisers == braces) initialisers = -1;
            if (strchr(";{}", s[i])) no_constructor = false;
            if (s[i] == '?') no_constructor = true;
            braces += s[i] == '{', brackets += s[i] == '(', brackets -= s[i] == ')';
            if (s[i] == '}') end_hiding(braces--);
            if (s[i] == ';' && !brackets) end_hiding(braces + 1);  // of a declaration with no body
        }
        out += s.substr(i, end - i);
        i = end;
    }
    return out;
}

// A literal 0 or NULL may be for a pointer: as a copy it would be an int.
inline string launch_arguments(const std::vector<string>& parts) {
    string all;
    for (const string& part : parts) all += (all.empty() ? "" : ",") + (trim(part) == "0" || trim(part) == "__null" ? "simt::Zero{}" : part);
    return all;
}

// The parts of a list, of which "f<a, b>(c)" is one.
inline std::vector<string> elements(const string& list) {
    std::vector<string> all;
    auto open_angles = [](const string& s) { return std::count(s.begin(), s.end(), '<') - std::count(s.begin(), s.end(), '>'); };
    for (const string& part : split(list, ','))
        if (!all.empty() && open_angles(all.back()) > 0 && open_angles(part) < 0) all.back() += "," + part;
        else all.push_back(part);
    if (trim(all.back()).empty()) all.pop_back();  // behind the last comma
    return all;
}

// Of "{a, {b, .c = d}}" what the kernel gets, "{simt_0, {simt_1, .c = simt_2}}"; `values` are those of the launch.
inline string in_braces(const string& argument, std::vector<string>& values) {
    const string text = trim(argument);
    const size_t begin = text[0] == '.' ? text.find_first_not_of(" \t\n=", std::min(text.find('='), text.find('{'))) : 0;
    if (begin && begin != text.npos) return text.substr(0, begin) + in_braces(text.substr(begin), values);
    if (text[0] != '{') {
        values.push_back(text);
        return "simt_" + std::to_string(values.size() - 1);
    }
    string all;
    for (const string& part : elements(text.substr(1, text.size() - 2))) all += (all.empty() ? "" : ", ") + in_braces(part, values);
    return "{" + all + "}";
}

// `skipped(file)`: whether a header stays as it is.
inline Result source(const string& preprocessed, const std::function<bool(const string&)>& skipped) {
    const string s = with_built_in(preprocessed, skipped);
    Result r;
    string& out = r.text;
    string file;
    int line = 0;
    bool skip = false;
    std::vector<Scope> scopes;  // of the open braces
    auto in_scope = [&](Scope scope) { return std::find(scopes.begin(), scopes.end(), scope) != scopes.end(); };
    bool named_barriers = false;
    int barrier_line = -1, barriers = 0;  // so many on this line
    size_t constant_end = 0;  // where the declaration of a __constant__ variable ends, and what comes behind
    string constant_lines;
    auto lines_of = [](const string& text) { return string(size_t(std::count(text.begin(), text.end(), '\n')), '\n'); };
    auto one_line = [](string text) {
        // Behind a macro of a system header comes where the line is from: "# 12 "file"".
        for (size_t at = 0; (at = text.find('#', at)) != text.npos;) {
            const size_t end = std::min(text.find('\n', at), text.size());
            if ((at == 0 || text[at - 1] == '\n') && at + 2 < text.size() && isdigit((unsigned char)text[at + 2])) text.erase(at, end - at);
            else at++;
        }
        for (char& c : text)
            if (c == '\n') c = ' ';
        return text;
    };
    for (size_t i = 0; i < s.size();) {
        if (s[i] == '\n') line++;
        if (s[i] == '#' && (i == 0 || s[i - 1] == '\n')) {  // # 12 "file" 3
            const size_t end = std::min(s.find('\n', i), s.size());
            const string marker = s.substr(i, end - i);
            const size_t open = marker.find('"'), close = marker.rfind('"');
            if (open != close && isdigit((unsigned char)marker[2])) {
                line = stoi(marker.substr(2)) - 1;
                file = marker.substr(open + 1, close - open - 1);
                skip = marker.find(" 3", close) != marker.npos || skipped(file);
            }
            out += marker;
            i = end;
            continue;
        }
        if (is_literal(s, i)) {
            if (s[i] == '"' && i && s[i - 1] == 'R') {
                const size_t open = s.find('(', i);
                const size_t end = s.find(")" + s.substr(i + 1, open - i - 1) + "\"", open);
                const string all = s.substr(i, end + open - i + 1 - i);
                line += int(std::count(all.begin(), all.end(), '\n'));
                out += all, i += all.size();
                continue;
            }
            const size_t end = skip_literal(s, i);
            out += s.substr(i, end - i);
            i = end;
            continue;
        }
        if (!skip && s.compare(i, 3, "<<<") == 0) {
            // Back over the kernel's name and its template arguments.
            size_t from = out.find_last_not_of(" \t\n");
            if (from != out.npos && out[from] == '>') {
                int depth = 0;
                do {
                    if (out[from] == ')') from = open_before(out, from);
                    depth += out[from] == '>';
                    depth -= out[from] == '<';
                } while (depth && from--);
                while (from && isspace((unsigned char)out[from - 1])) from--;
            } else {
                from++;
            }
            // (*f), fs[i], s.k, p->k
            auto brackets = [&] {
                while (from && (out[from - 1] == ')' || out[from - 1] == ']')) from = open_before(out, from - 1);
            };
            brackets();
            while (from && (out[from - 1] == '.' || (from > 1 && out[from - 1] == '>' && out[from - 2] == '-') || is_word(out[from - 1]) || (from > 1 && out[from - 1] == ':' && out[from - 2] == ':'))) {
                const bool member = out[from - 1] == '.' || out[from - 1] == '>';
                from -= out[from - 1] == ':' || out[from - 1] == '>' ? 2 : 1;
                if (member) brackets();
            }
            const string kernel = trim(out.substr(from));
            size_t end = i + 3;
            while (end < s.size() && s.compare(end, 3, ">>>") != 0)
                end = s[end] == '(' || s[end] == '{' || s[end] == '[' ? skip_brackets(s, end) : s[end] == '"' ? skip_literal(s, end) : end + 1;
            const size_t open = s.find('(', end);
            if (!kernel.empty() && open != s.npos) {
                const size_t close = skip_brackets(s, open);
                const string config = s.substr(i + 3, end - i - 3), arguments = s.substr(open + 1, close - open - 2);
                const bool none = trim(arguments).empty();
                string quoted;
                for (char c : one_line(kernel)) quoted += c == '"' || c == '\\' ? string("\\") + c : string(1, c);
                const string newlines = lines_of(out.substr(from)) + lines_of(s.substr(i, close - i));
                line += int(lines_of(s.substr(i, close - i)).size());
                out.erase(from);
                const std::vector<string> parts = none ? std::vector<string>() : split(one_line(arguments), ',');
                const bool braces = std::any_of(parts.begin(), parts.end(), [](const string& part) { return trim(part)[0] == '{'; });
                std::vector<string> values;
                string parameters = "auto... simt_p", passed = "simt_p...";
                if (braces) {
                    parameters.clear(), passed.clear();
                    for (const string& part : elements(one_line(arguments))) passed += (passed.empty() ? "" : ", ") + in_braces(part, values);
                    for (size_t k = 0; k < values.size(); k++) parameters += (k ? ", auto simt_" : "auto simt_") + std::to_string(k);
                }
                const string all = launch_arguments(braces ? values : parts);
                out += "simt::launch(\"" + quoted + "\", simt::Config(" + one_line(config) + "), [=](" + parameters + ") { " + one_line(kernel) + "(" + passed + "); }" +
                       (all.empty() ? "" : ", ") + all + ")" + newlines;
                i = close;
                continue;
            }
        }
        if (s[i] == '{') scopes.push_back(scope_behind(out));
        if (s[i] == '}' && !scopes.empty()) scopes.pop_back();
        if (i && i == constant_end) {
            out += ";" + constant_lines;
            i++;
            continue;
        }
        if (!is_word(s[i])) {
            out += s[i++];
            continue;
        }
        const size_t end = token_end(s, i);
        const string word = s.substr(i, end - i);
        if (!skip) r.special_functions |= is_special_function(word);
        if (!skip && (word == "asm" || word == "__asm__" || word == "__asm")) {
            size_t at = end;
            for (;;) {
                at = s.find_first_not_of(" \t\n", at);
                size_t stop = at;
                while (stop < s.size() && is_word(s[stop])) stop++;
                if (stop == at) break;
                at = stop;
            }
            if (at < s.size() && s[at] == '(') {
                const size_t close = skip_brackets(s, at);
                string unknown;
                const string call = Ptx::translated(s.substr(at + 1, close - at - 2), unknown);
                if (!unknown.empty()) r.unknown.push_back(file + ":" + std::to_string(line) + ": inline PTX that the emulator does not know: " + unknown);
                const string newlines = lines_of(s.substr(i, close - i));
                line += int(newlines.size());
                out += one_line(call) + newlines;
                i = close;
                continue;
            }
        }
        // The type of a kernel says its parameters: "(void*)kernel" is the kernel.
        if (!skip && (word == "cudaLaunchKernel" || word == "cudaLaunchCooperativeKernel" || word == "cudaLaunchKernelExC")) {
            const size_t open = s.find_first_not_of(" \t\n", end);
            const size_t comma = word != "cudaLaunchKernelExC" || open == s.npos || s[open] != '(' ? open : open + 1 + split(s.substr(open + 1, skip_brackets(s, open) - open - 2), ',')[0].size();
            const size_t at = comma == s.npos ? comma : s.find_first_not_of(" \t\n", comma + 1);
            if (at != s.npos && s[open] == '(') {
                size_t stop = at;
                for (const char* cast : {"(void*)", "(void *)", "(const void*)", "(const void *)", "(void const*)", "reinterpret_cast<void*>", "reinterpret_cast<void *>",
                                         "reinterpret_cast<const void*>", "reinterpret_cast<const void *>"})
                    if (s.compare(at, strlen(cast), cast) == 0) stop = at + strlen(cast);
                const string passed = s.substr(i, at - i);
                if (stop > at) {
                    line += int(lines_of(passed).size());
                    out += passed;
                    i = stop;
                    continue;
                }
            }
        }
        // `inline __forceinline__` is `inline` twice.
        if (!skip && (word == "inline" || word == "__inline__")) {
            const size_t begin = out.find_last_of(";{}\n");
            const string head = out.substr(begin == out.npos ? 0 : begin + 1);
            if (head.find("inline ") != head.npos || head.find("__inline__") != head.npos) {
                i = end;
                continue;
            }
        }
        if (!skip && word == "__syncthreads") {
            const size_t open = s.find_first_not_of(" \t", end);
            barriers = line == barrier_line ? barriers + 1 : 0;
            barrier_line = line;
            if (barriers && open < s.size() && s.compare(open, 2, "()") == 0) {
                out += "__syncthreads({__builtin_FILE(), __builtin_LINE(), " + std::to_string(barriers) + "})";
                i = open + 2;
                continue;
            }
        }
        if (!skip) named_barriers |= word == "__barrier_sync" || word == "__barrier_sync_count";
        if (!skip && word == "__attribute__" && s.compare(i, strlen(kConstantMark), kConstantMark) == 0 && !in_scope(Scope::other) && !in_scope(Scope::in_template)) {
            size_t stop = i;
            while (stop < s.size() && s[stop] != ';')
                stop = s[stop] == '(' || s[stop] == '{' || s[stop] == '[' ? skip_brackets(s, stop) : s[stop] == '"' ? skip_literal(s, stop) : stop + 1;
            const size_t begin = out.find_last_of(";{}");
            const string head = out.substr(begin == out.npos ? 0 : begin + 1);
            if (head.find("extern") == head.npos && head.find("template") == head.npos) {
                constant_end = stop, constant_lines.clear();
                for (const string& name : declared_names(s.substr(i, stop - i)))
                    constant_lines += " static const bool simt_constant_" + name + " = simt::add_constant(&" + name + ", sizeof " + name + ");";
            }
        }
        // "simt_cluster_dims(2, 1, 1) void kernel(int* to)": a line before it says so. The parenthesis of the parameters is the first that is no attribute's.
        if (!skip && word == "simt_cluster_dims") {
            const size_t close = skip_brackets(s, s.find('(', end));
            size_t open = s.find('(', close);
            while (open != s.npos && word_before(s, close, open) == "__attribute__") open = s.find('(', skip_brackets(s, open));
            const string kernel = word_before(s, close, open);
            const size_t before = out.find_last_of(";{}");
            out.insert(before == out.npos ? 0 : before + 1, "static const bool simt_cluster_" + kernel + "_" + std::to_string(line) + " = simt::add_cluster_dims(\"" + kernel + "\", dim3" +
                           one_line(s.substr(end, close - end)) + "); ");
            const string newlines = lines_of(s.substr(i, close - i));
            line += int(newlines.size()), out += newlines;
            i = close;
            continue;
        }
        // "__shared__ alignas(16) float s[64]": the compiler wants the alignment first.
        if (!skip && word == "alignas") {
            const size_t before = out.find_last_of(";{}"), head = before == out.npos ? 0 : before + 1, begin = out.find_first_not_of(" \t\n", head);
            const size_t close = skip_brackets(s, s.find('(', end));
            if (begin != out.npos && out.find("thread_local", begin) != out.npos && out.find('#', begin) == out.npos) {
                out.insert(begin, one_line(s.substr(i, close - i)) + " ");
                i = close;
                continue;
            }
        }
        if (!skip && word == "extern") {
            const size_t stop = s.find(';', i);
            string declaration = s.substr(i, stop - i);
            // Dynamic shared memory has the alignment that it has.
            if (const size_t at = declaration.find("alignas"); at != declaration.npos && declaration.find("thread_local") < at)
                declaration.erase(at, skip_brackets(declaration, declaration.find('(', at)) - at);
            if (declaration.find("thread_local") != declaration.npos && declaration.find_first_of("{\"") == declaration.find("\"global-dynamic")) {
                line += int(lines_of(declaration).size());
                // Of a template's local declarations the compiler forgets the name behind asm.
                out += in_scope(Scope::in_template) ? dynamic_reference(declaration) : declaration + " asm(\"smem\")";
                i = stop;
                continue;
            }
        }
        out += word;
        i = end;
    }
    named_barriers |= out.find("simt::named_barrier(int(") != out.npos || out.find("simt::named_arrive(int(") != out.npos;
    if (named_barriers) out += "\nstatic const bool simt_barriers = simt::use_named_barriers();\n";
    return r;
}

}  // namespace translate
