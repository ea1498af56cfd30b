//! From an ONNX file to a network of tract's: choose the tensor, cut the graph down to what it needs, fix the shapes.

use std::any::Any;
use std::cell::Cell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::{self, Read};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Arc;

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::{Dimension, dimension};
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, ValueInfoProto, type_proto};
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::Factoid;
use tract_onnx::tract_hir::internal::DimLike;

use crate::formats::fingerprint::{Fingerprint, Hasher};
use crate::formats::{At, FileError, input};

use super::{About, FeatureTensor, Layout, MAX_ELEMENTS, MAX_NODES, MAX_SIDE, OnnxError, OnnxNetwork, Port};

/// A graph of fixed shapes, ready to run from any thread.
pub struct Runnable(Arc<TypedRunnableModel>);

impl Runnable {
    /// The output for an input of this shape, as a flat list; else what went wrong.
    pub fn run(&self, shape: &[usize], values: &[f32]) -> Result<Vec<f32>, String> {
        guarded(|| {
            let input = Tensor::from_shape(shape, values)?;
            let output = self.0.run(tvec!(input.into()))?;
            let output = output.first().ok_or_else(|| TractError::msg("no output"))?.cast_to::<f32>()?.into_owned();
            Ok(output.try_as_plain_ram()?.as_slice::<f32>()?.to_vec())
        })
    }
}

/// Reads what a file says: see [`About::open`].
pub fn about(path: &Path) -> Result<About, OnnxError> {
    let (model, graph) = read_graph(path)?;
    let weights: HashSet<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
    let inputs = graph.input.iter().filter(|input| !weights.contains(input.name.as_str())).map(port).collect();
    let values = |tensor: &TensorProto| tensor.dims.iter().fold(1u64, |n, &side| n.saturating_mul(side.unsigned_abs()));
    let framework = tract_onnx::onnx();
    let unknown =
        graph.node.iter().map(|node| &node.op_type).filter(|name| !framework.op_register.0.contains_key(*name));
    let unsupported: BTreeSet<_> = unknown.map(|name| printable(name)).collect();
    Ok(About {
        producer: printable(format!("{} {}", model.producer_name, model.producer_version).trim()),
        inputs,
        outputs: graph.output.iter().map(port).collect(),
        nodes: graph.node.len(),
        values: graph.initializer.iter().map(values).fold(0, u64::saturating_add),
        features: pooled(&graph).map(printable),
        unsupported: unsupported.into_iter().collect(),
        fingerprint: fingerprint(path, &graph)?,
    })
}

fn port(info: &ValueInfoProto) -> Port {
    let tensor = info.r#type.as_ref().and_then(|of| of.value.as_ref());
    let tensor = tensor.map(|type_proto::Value::TensorType(tensor)| tensor);
    let kind = tensor.and_then(|tensor| DataType::try_from(tensor.elem_type).ok());
    let side = |side: &Dimension| match &side.value {
        Some(dimension::Value::DimValue(side)) => side.to_string(),
        Some(dimension::Value::DimParam(name)) if !name.is_empty() => printable(name),
        _ => "?".into(),
    };
    Port {
        name: printable(&info.name),
        kind: kind.map_or("unknown".into(), |kind| kind.as_str_name().to_lowercase()),
        shape: tensor.iter().flat_map(|tensor| &tensor.shape).flat_map(|shape| &shape.dim).map(side).collect(),
    }
}

/// Opens a file: see [`OnnxNetwork::open`].
pub fn open(path: &Path, wanted: FeatureTensor, size: Option<[usize; 2]>) -> Result<OnnxNetwork, OnnxError> {
    let (mut model, mut graph) = read_graph(path)?;
    let fingerprint = fingerprint(path, &graph)?;
    let node = choose(&graph, wanted, path)?;
    keep_ancestors(&mut graph, &node);
    let (layout, size, any_size) = fix_input(&mut graph, size, path)?;
    graph.output = vec![ValueInfoProto { name: node.clone(), ..Default::default() }];
    let framework = tract_onnx::onnx().with_ignore_value_info(true);
    if let Some(bad) = graph.node.iter().find(|node| !framework.op_register.0.contains_key(&node.op_type)) {
        let (operator, node) = (printable(&bad.op_type), printable(label(bad)));
        return Err(OnnxError::Operator { path: path.into(), operator, node });
    }
    if let Some((bad, what)) = graph.node.iter().find_map(|node| Some((node, computed_otherwise(node)?))) {
        return Err(OnnxError::Otherwise { path: path.into(), node: printable(label(bad)), what });
    }
    // With such a permutation tract would never end, and fill the memory.
    if let Some(bad) = graph.node.iter().find(|node| node.op_type == "Transpose" && !permutes(node)) {
        let what = format!("node {}: its perm is no permutation", printable(label(bad)));
        return Err(OnnxError::Damaged { path: path.into(), what });
    }
    if graph.node.len() > MAX_NODES {
        return Err(OnnxError::TooLong { path: path.into(), nodes: graph.node.len() });
    }
    // Most operators of tract's make a number of a NaN, so it would not be seen in the features.
    if let Some(bad) = graph.initializer.iter().find(|tensor| has_nan(tensor)) {
        let what = format!("tensor {}: found NaN, expected numbers", printable(&bad.name));
        return Err(OnnxError::Damaged { path: path.into(), what });
    }
    check_numbers(&graph).map_err(|what| OnnxError::Damaged { path: path.into(), what })?;
    let has = |operators: &[&str]| graph.node.iter().any(|node| operators.contains(&&*node.op_type));
    let slices = has(&["Slice", "Split"]) && has(&["Conv"]);
    model.graph = Some(graph);
    let refused = |what| OnnxError::Run { path: path.into(), what };

    let folder = path.parent().and_then(Path::to_str);
    let mut inferred = guarded(|| framework.parse(&model, folder)).map_err(refused)?;
    drop(model); // the weights, which are tract's by now
    if !inferred.unresolved_inputs.is_empty() {
        let names: Vec<_> = inferred.unresolved_inputs.iter().take(5).map(|name| printable(name)).collect();
        let names = names.join(", ");
        return Err(OnnxError::Damaged { path: path.into(), what: format!("nothing makes the tensors {names}") });
    }
    let inferred = guarded(|| {
        inferred.model.analyse(false)?;
        Ok(inferred.model)
    })
    .map_err(refused)?;
    let too_large = |elements| OnnxError::TooLarge { path: path.into(), elements };
    let dims = |fact: &InferenceFact| fact.shape.concretize();
    check_sizes(inferred.nodes().iter().flat_map(|node| node.outputs.iter().filter_map(|out| dims(&out.fact))))
        .map_err(too_large)?;
    let typed = guarded(|| inferred.into_typed()).map_err(refused)?;
    check_sizes(typed.nodes().iter().flat_map(|node| node.outputs.iter().map(|out| out.fact.shape.to_tvec())))
        .map_err(too_large)?;
    let shape = typed.output_fact(0).map(|fact| fact.shape.to_tvec()).map_err(|error| refused(condensed(&error)))?;
    let sides: Vec<usize> = shape.iter().filter_map(|side| side.to_usize().ok()).collect();
    let width = sides.iter().product();
    if sides.len() != shape.len() || sides.iter().filter(|&&side| side > 1).count() > 1 || width == 0 {
        let found = format!("[{}]", shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
        return Err(OnnxError::NoVector { path: path.into(), name: printable(&node), found });
    }
    let runnable = runnable(typed, &layout.shape(size), slices).map_err(refused)?;
    Ok(OnnxNetwork { path: path.into(), node, layout, size, any_size, width, fingerprint, runnable })
}

fn read(path: &Path) -> Result<ModelProto, OnnxError> {
    let io = |cause: io::Error| match cause.kind() {
        io::ErrorKind::InvalidInput => OnnxError::NotOnnx { path: path.into(), what: cause.to_string() },
        _ => FileError { path: path.into(), cause }.into(),
    };
    let mut first = Vec::new();
    input::open(path).map_err(io)?.take(input::HEAD as u64).read_to_end(&mut first).map_err(io)?;
    if let Some(kind) = input::kind(&first).filter(|kind| !kind.contains("ONNX")) {
        return Err(OnnxError::NotOnnx { path: path.into(), what: format!("it is {kind}") });
    }
    if input::is_text(&first) {
        return Err(OnnxError::NotOnnx { path: path.into(), what: "it is text".into() });
    }
    guarded(|| tract_onnx::onnx().proto_model_for_path(path)).map_err(|what| match first[..] {
        // Fields are written in order, and the version comes first.
        [0x08, ..] => OnnxError::Damaged { path: path.into(), what },
        _ => OnnxError::NotOnnx { path: path.into(), what },
    })
}

/// A file's message, and the graph out of it.
fn read_graph(path: &Path) -> Result<(ModelProto, GraphProto), OnnxError> {
    let mut model = read(path)?;
    let graph = model.graph.take().filter(|graph| !graph.node.is_empty());
    let graph = graph.ok_or_else(|| OnnxError::NotOnnx { path: path.into(), what: "it has no graph".into() })?;
    Ok((model, graph))
}

/// Fingerprint of the file and, in the order of their names, of the files beside it that hold weights.
fn fingerprint(path: &Path, graph: &GraphProto) -> Result<Fingerprint, OnnxError> {
    let own = Fingerprint::of_file(path).at(path)?;
    let places = graph.initializer.iter().flat_map(|tensor| &tensor.external_data);
    let others: BTreeSet<&str> = places.filter(|entry| entry.key == "location").map(|entry| &*entry.value).collect();
    if others.is_empty() {
        return Ok(own);
    }
    let mut hasher = Hasher::default();
    hasher.add(format!("{own:?}").as_bytes());
    for other in others {
        let path = path.with_file_name(other);
        let of = Fingerprint::of_file(&path).at(&path)?;
        hasher.add(format!("{of:?}").as_bytes());
    }
    Ok(hasher.finish())
}

/// The name of the tensor that is wanted, which a node makes.
fn choose(graph: &GraphProto, wanted: FeatureTensor, path: &Path) -> Result<String, OnnxError> {
    let made: HashSet<&str> = graph.node.iter().flat_map(|node| &node.output).map(String::as_str).collect();
    let missing = |name: &str| {
        let score = |known: &&str| strsim::jaro_winkler(known, name);
        let mut near: Vec<&str> = made.iter().copied().filter(|known| score(known) > 0.7).collect();
        near.sort_by(|a, b| score(b).total_cmp(&score(a)).then(a.cmp(b)));
        near.truncate(5);
        OnnxError::Missing { path: path.into(), name: printable(name), near: near.into_iter().map(printable).collect() }
    };
    let name = match wanted {
        FeatureTensor::Named(name) => name,
        FeatureTensor::Output => match &graph.output[..] {
            [one] => &one.name,
            several => {
                let names: Vec<_> = several.iter().map(|output| printable(&output.name)).take(5).collect();
                return Err(OnnxError::Outputs { path: path.into(), found: several.len(), names });
            }
        },
        FeatureTensor::Pooled => pooled(graph).ok_or_else(|| OnnxError::NoClassifier {
            path: path.into(),
            candidates: {
                let products = graph.node.iter().rev().filter(|node| is_product(node));
                let inputs = products.flat_map(|node| node.input.first()).filter(|name| made.contains(name.as_str()));
                inputs.take(5).map(|name| printable(name)).collect()
            },
        })?,
    };
    if made.contains(name) { Ok(name.into()) } else { Err(missing(name)) }
}

fn is_product(node: &NodeProto) -> bool {
    matches!(&*node.op_type, "Gemm" | "MatMul")
}

fn label(node: &NodeProto) -> &str {
    let output = node.output.first().map_or("", |name| name);
    if node.name.is_empty() { output } else { &node.name }
}

/// The tensor that the classifier of a WD tagger is given. In the second version, which comes from Keras, the
/// classifier is the first node with a part `predictions_dense` in its name. In the third version, which comes from
/// timm, it is the last matrix product below `core_model/head`.
fn pooled(graph: &GraphProto) -> Option<&str> {
    let parts = |name: &str| -> Vec<String> {
        name.split(['/', '.']).filter(|part| !part.is_empty()).map(str::to_owned).collect()
    };
    let keras = |name: &str| parts(name).iter().any(|part| part == "predictions_dense");
    let timm = |name: &str| parts(name).starts_with(&["core_model".into(), "head".into()]);
    let weights: HashSet<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
    let data = |node: &'_ NodeProto, own: &dyn Fn(&str) -> bool| {
        node.input.iter().position(|name| !weights.contains(name.as_str()) && !own(name))
    };
    let v2 = graph.node.iter().filter(|node| keras(&node.name));
    let v2 = v2.filter_map(|node| data(node, &keras).map(|at| &node.input[at])).next();
    let v3 = || {
        let node = graph.node.iter().rfind(|node| timm(&node.name) && is_product(node))?;
        data(node, &|_| false).map(|at| &node.input[at])
    };
    v2.or_else(v3).map(String::as_str)
}

/// What tract 0.23.9 computes otherwise than ONNX says, where a node asks for it.
fn computed_otherwise(node: &NodeProto) -> Option<&'static str> {
    let attribute = |name: &str| node.attribute.iter().find(|attribute| attribute.name == name);
    match &*node.op_type {
        "Celu" if attribute("alpha").is_some_and(|alpha| alpha.f != 1.0) => Some("Celu with an alpha that is not 1"),
        "ConvTranspose" if attribute("output_shape").is_some() => Some("ConvTranspose with an output_shape"),
        "GridSample" if attribute("mode").is_some_and(|mode| mode.s.ends_with(b"cubic")) => {
            Some("GridSample by cubics")
        }
        _ => None,
    }
}

/// A network ready to run. tract makes a faster one of it. In tract 0.23.9 that computes something else where a convolution
/// takes over the step of a slice, or of a convolution of 1x1 behind a slice, that does not begin at 0. So with `slices`
/// both are tried, which takes as long as some pictures, and where they differ the slower one is taken.
fn runnable(typed: TypedModel, shape: &[usize], slices: bool) -> Result<Runnable, String> {
    if !slices {
        return Ok(Runnable(guarded(|| typed.into_optimized()?.into_runnable())?));
    }
    let fast = Runnable(guarded(|| typed.clone().into_optimized()?.into_runnable())?);
    let Ok(plain) = guarded(|| typed.into_runnable()).map(Runnable) else { return Ok(fast) };
    // Numbers that look like a picture's, and are the same each time.
    let count = shape.iter().product::<usize>() as u32;
    let noise: Vec<f32> = (0..count).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 24) as f32).collect();
    let Ok(expected) = plain.run(shape, &noise) else { return Ok(fast) };
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let Ok(found) = fast.run(shape, &noise) else { return Ok(plain) };
    let error = norm(&mut found.iter().zip(&expected).map(|(found, expected)| found - expected));
    Ok(if error <= SAME * norm(&mut expected.iter().copied()) { fast } else { plain })
}

/// Relative difference of what is computed in another order.
const SAME: f64 = 1e-3;

/// Whether a weight in the file is no number. Infinities may be meant, as in masks. Weights in files beside it are not read.
fn has_nan(tensor: &TensorProto) -> bool {
    let raw = &tensor.raw_data;
    match DataType::try_from(tensor.data_type) {
        Ok(DataType::Float) => {
            tensor.float_data.iter().any(|x| x.is_nan())
                || raw.as_chunks().0.iter().any(|&x| f32::from_le_bytes(x).is_nan())
        }
        Ok(DataType::Double) => {
            tensor.double_data.iter().any(|x| x.is_nan())
                || raw.as_chunks().0.iter().any(|&x| f64::from_le_bytes(x).is_nan())
        }
        Ok(DataType::Float16) => raw.as_chunks().0.iter().any(|&x| half::f16::from_le_bytes(x).is_nan()),
        _ => false,
    }
}

fn permutes(node: &NodeProto) -> bool {
    node.attribute.iter().filter(|attribute| attribute.name == "perm").all(|attribute| {
        let mut places = attribute.ints.clone();
        places.sort_unstable();
        places.into_iter().eq(0..attribute.ints.len() as i64)
    })
}

/// Names of all tensors that a node reads. A graph inside it may read tensors that are made outside of it.
fn inputs(node: &NodeProto) -> Vec<&str> {
    let inner = node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs));
    let inner = inner.flat_map(|graph| graph.node.iter().flat_map(inputs).chain(graph.output.iter().map(|o| &*o.name)));
    node.input.iter().map(String::as_str).chain(inner).collect()
}

/// Drops all nodes, weights and inputs that play no role for a tensor.
fn keep_ancestors(graph: &mut GraphProto, target: &str) {
    let makers: HashMap<&str, usize> =
        graph.node.iter().enumerate().flat_map(|(i, node)| node.output.iter().map(move |name| (&**name, i))).collect();
    let (mut nodes, mut names) = (HashSet::new(), HashSet::new());
    let mut open = vec![target];
    while let Some(name) = open.pop() {
        if names.insert(name.to_owned())
            && let Some(&maker) = makers.get(name)
            && nodes.insert(maker)
        {
            open.extend(inputs(&graph.node[maker]));
        }
    }
    let mut place = 0..;
    graph.node.retain(|_| place.next().is_some_and(|i| nodes.contains(&i)));
    graph.initializer.retain(|tensor| names.contains(&tensor.name));
    graph.sparse_initializer.clear(); // tract has none
    graph.input.retain(|input| names.contains(&input.name));
}

/// Finds the input of images and fixes its shape for one image. Also returns whether the file left the size open.
fn fix_input(
    graph: &mut GraphProto,
    size: Option<[usize; 2]>,
    path: &Path,
) -> Result<(Layout, [usize; 2], bool), OnnxError> {
    let wrong = |found: String| OnnxError::Input { path: path.into(), found };
    // Old files list the weights among the inputs.
    let weights: HashSet<&str> = graph.initializer.iter().map(|tensor| tensor.name.as_str()).collect();
    let mut inputs: Vec<_> = graph.input.iter_mut().filter(|input| !weights.contains(input.name.as_str())).collect();
    let [input] = &mut inputs[..] else {
        let names: Vec<_> = inputs.iter().take(5).map(|input| printable(&input.name)).collect();
        return Err(wrong(match names[..] {
            [] => "the features depend on no input".into(),
            _ => format!("{} inputs ({})", inputs.len(), names.join(", ")),
        }));
    };
    let name = printable(&input.name);
    let Some(type_proto::Value::TensorType(tensor)) = input.r#type.as_mut().and_then(|of| of.value.as_mut()) else {
        return Err(wrong(format!("the input {name} has no type")));
    };
    let number = |dim: &Dimension| match dim.value {
        Some(dimension::Value::DimValue(side)) => usize::try_from(side).ok().filter(|&side| side > 0),
        _ => None,
    };
    let dims: Vec<Option<usize>> = tensor.shape.iter().flat_map(|shape| &shape.dim).map(number).collect();
    let shown = || {
        let dims: Vec<_> = dims.iter().map(|dim| dim.map_or("?".into(), |side| side.to_string())).collect();
        format!("the input {name} is [{}]", dims.join(", "))
    };
    if tensor.elem_type != DataType::Float as i32 {
        let kind = DataType::try_from(tensor.elem_type).map_or("of an unknown type", |kind| kind.as_str_name());
        return Err(wrong(format!("the input {name} is {}", kind.to_lowercase())));
    }
    let (layout, sides) = match dims[..] {
        [None | Some(1), height, width, Some(3)] => (Layout::Last, [height, width]),
        [None | Some(1), Some(3), height, width] => (Layout::First, [height, width]),
        _ => return Err(wrong(shown())),
    };
    let size = match (sides, size) {
        ([Some(height), Some(width)], _) => [height, width],
        ([None, None], Some(size)) => size,
        _ => return Err(wrong(format!("{}, which leaves the size open", shown()))),
    };
    let [height, width] = size;
    if height.max(width) > MAX_SIDE {
        return Err(wrong(format!("{}, larger than {MAX_SIDE}", shown())));
    }
    let dim = |side: usize| Dimension { value: Some(dimension::Value::DimValue(side as i64)), ..Default::default() };
    tensor.shape = Some(TensorShapeProto { dim: layout.shape(size).map(dim).into() });
    Ok((layout, size, sides == [None, None]))
}

/// Operators that make a tensor whose size is the value of an input, and the number of the first input that may say it.
const SIZED: [(&str, usize); 9] = [
    ("ConstantOfShape", 0),
    ("Expand", 1),
    ("OneHot", 1),
    ("Pad", 1),
    ("Range", 0),
    ("Reshape", 1),
    ("Resize", 1),
    ("Tile", 1),
    ("Upsample", 1),
];

/// Fails for a window, a border or a shape that no image of [`MAX_SIDE`] needs. tract would allocate what they say
/// before it checks them.
fn check_numbers(graph: &GraphProto) -> Result<(), String> {
    let numbers = |tensor: &TensorProto| -> Vec<i64> {
        let raw = tensor.raw_data.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes));
        let small = tensor.data_type == DataType::Int64 as i32 && tensor.raw_data.len() <= 1024;
        if small { tensor.int64_data.iter().copied().take(128).chain(raw).collect() } else { Vec::new() }
    };
    let mut known: HashMap<&str, Vec<i64>> = HashMap::new();
    known.extend(graph.initializer.iter().map(|tensor| (&*tensor.name, numbers(tensor))));
    for node in graph.node.iter().filter(|node| node.op_type == "Constant") {
        let values = node.attribute.iter().find_map(|attribute| attribute.t.as_ref());
        known.extend(node.output.first().zip(values).map(|(name, tensor)| (&**name, numbers(tensor))));
    }
    for node in &graph.node {
        let wrong = |what: &str, values: &[i64]| {
            let shown = &values[..values.len().min(8)];
            Err(format!("node {}: {what} {shown:?}, larger than any image", printable(label(node))))
        };
        let spatial = ["kernel_shape", "strides", "dilations", "pads", "output_padding", "output_shape"];
        for attribute in node.attribute.iter().filter(|attribute| spatial.contains(&&*attribute.name)) {
            if attribute.ints.iter().any(|&n| n.unsigned_abs() > MAX_SIDE as u64) {
                return wrong(&attribute.name, &attribute.ints);
            }
        }
        let Some(&(_, first)) = SIZED.iter().find(|(operator, _)| *operator == node.op_type) else { continue };
        for values in node.input.iter().skip(first).filter_map(|name| known.get(&**name)) {
            let elements = values.iter().fold(1u64, |product, &n| product.saturating_mul(n.unsigned_abs().max(1)));
            if elements > MAX_ELEMENTS as u64 {
                return wrong(&node.op_type, values);
            }
        }
    }
    Ok(())
}

/// Fails with the number of elements of the first tensor that has too many.
fn check_sizes(shapes: impl Iterator<Item = TVec<TDim>>) -> Result<(), String> {
    for shape in shapes {
        let sides = shape.iter().map(|side| side.to_usize().unwrap_or(1));
        let elements = sides.fold(1usize, |product, side| product.saturating_mul(side));
        if elements > MAX_ELEMENTS {
            return Err(shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x "));
        }
    }
    Ok(())
}

thread_local! {
    /// Whether panics of this thread are expected.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// From now on, panics that become errors of networks are not printed.
pub fn hush_panics() {
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !QUIET.get() {
            before(info);
        }
    }));
}

/// Calls tract. Its error, or its panic, becomes one line.
fn guarded<T>(call: impl FnOnce() -> TractResult<T>) -> Result<T, String> {
    let before = QUIET.replace(true);
    // Whatever a panic leaves half done is dropped with the closure.
    let result = panic::catch_unwind(AssertUnwindSafe(call));
    QUIET.set(before);
    match result {
        Ok(result) => result.map_err(|error| condensed(&error)),
        Err(panic) => Err(shortened(&format!("tract gave up: {}", message(&*panic)))),
    }
}

/// A name out of a file, on one line.
fn printable(name: &str) -> String {
    shortened(&name.escape_debug().to_string())
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it did not say why")
}

fn condensed(error: &TractError) -> String {
    let causes: Vec<_> = error.chain().map(ToString::to_string).collect();
    shortened(&causes.join(": "))
}

/// One line, not too long: tract's messages may hold whole tensors.
fn shortened(text: &str) -> String {
    const LONGEST: usize = 240;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(LONGEST) {
        None => line,
        Some((end, _)) => format!("{} ...", &line[..end]),
    }
}
