//! Writes ONNX files: as much of the protobuf messages as small networks need, and a small tagger.

/// A protobuf message under construction.
#[derive(Clone, Default)]
pub struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub fn int(mut self, field: u64, value: i64) -> Self {
        self.varint(field << 3);
        self.varint(value as u64);
        self
    }

    pub fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.as_ref().len() as u64);
        self.0.extend(value.as_ref());
        self
    }

    pub fn message(self, field: u64, value: Message) -> Self {
        self.bytes(field, value.0)
    }
}

/// Type numbers of ONNX.
pub const FLOAT: i64 = 1;
pub const UINT8: i64 = 2;

/// A side of a tensor: a number, or a name for one that is left open.
pub enum Dim {
    Fixed(i64),
    Open(&'static str),
}

pub fn value_info(name: &str, kind: i64, dims: &[Dim]) -> Message {
    let shape = dims.iter().fold(Message::default(), |shape, dim| {
        shape.message(
            1,
            match dim {
                Dim::Fixed(side) => Message::default().int(1, *side),
                Dim::Open(name) => Message::default().bytes(2, name),
            },
        )
    });
    let tensor = Message::default().int(1, kind).message(2, shape);
    Message::default().bytes(1, name).message(2, Message::default().message(1, tensor))
}

pub fn tensor(name: &str, dims: &[usize], values: &[f32]) -> Message {
    assert_eq!(values.len(), dims.iter().product::<usize>());
    let raw: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    dims.iter().fold(Message::default(), |t, &dim| t.int(1, dim as i64)).int(2, FLOAT).bytes(8, name).bytes(9, raw)
}

pub fn tensor_i64(name: &str, values: &[i64]) -> Message {
    let raw: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    Message::default().int(1, values.len() as i64).int(2, 7).bytes(8, name).bytes(9, raw)
}

pub fn node(name: &str, operator: &str, inputs: &[&str], output: &str) -> Message {
    let node = inputs.iter().fold(Message::default(), |node, input| node.bytes(1, input));
    node.bytes(2, output).bytes(3, name).bytes(4, operator)
}

/// A node's attribute that is a list of whole numbers.
pub fn ints(name: &str, values: &[i64]) -> Message {
    values.iter().fold(Message::default().bytes(1, name), |of, &value| of.int(8, value)).int(20, 7)
}

/// A node's attribute that is a number.
pub fn float(name: &str, value: f32) -> Message {
    let mut message = Message::default().bytes(1, name);
    message.0.push(2 << 3 | 5);
    message.0.extend(value.to_le_bytes());
    message.int(20, 1)
}

/// A node's attribute that is a whole number.
pub fn int(name: &str, value: i64) -> Message {
    Message::default().bytes(1, name).int(3, value).int(20, 2)
}

#[derive(Clone, Default)]
pub struct Graph {
    pub nodes: Vec<Message>,
    pub weights: Vec<Message>,
    pub inputs: Vec<Message>,
    pub outputs: Vec<Message>,
}

impl Graph {
    pub fn file(self) -> Vec<u8> {
        let fields = [(1, self.nodes), (5, self.weights), (11, self.inputs), (12, self.outputs)];
        let graph = fields.into_iter().fold(Message::default().bytes(2, "graph"), |graph, (field, all)| {
            all.into_iter().fold(graph, |graph, one| graph.message(field, one))
        });
        let opset = Message::default().bytes(1, "").int(2, 17);
        Message::default().int(1, 8).message(7, graph).message(8, opset).0
    }
}

/// A tagger in small, under the names of a WD tagger of the third version: [N, side, side, 3] of 0 to 255, a
/// convolution of 3x3 with stride 2, ReLU, the mean over the pixels (the features), a product, the sigmoid.
pub struct Tagger {
    pub side: usize,
    pub width: usize,
    pub tags: usize,
    pub kernel: Vec<f32>, // [width, 3, 3, 3]: out, in, y, x
    pub bias: Vec<f32>,   // [width]
}

/// Name of the tensor of its features.
pub const POOLED: &str = "/core_model/pool/Flatten_output_0";

impl Tagger {
    pub fn new(side: usize, width: usize) -> Self {
        let mut state = 12345u32;
        let mut next = || {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let kernel = (0..width * 27).map(|_| next() / 255.0).collect();
        Self { side, width, tags: 5, kernel, bias: (0..width).map(|_| next() / 4.0).collect() }
    }

    /// [N, H, W, 3] as Keras and SmilingWolf's files have it; `planes`: [N, 3, H, W].
    pub fn graph(&self, planes: bool) -> Graph {
        let (side, width, tags) = (Dim::Fixed(self.side as i64), self.width, self.tags);
        let side2 = Dim::Fixed(self.side as i64);
        let dims = match planes {
            false => [Dim::Open("batch"), side, side2, Dim::Fixed(3)],
            true => [Dim::Open("batch"), Dim::Fixed(3), side, side2],
        };
        let transpose = node("/Transpose", "Transpose", &["input"], "nchw").message(5, ints("perm", &[0, 3, 1, 2]));
        let conv =
            node("/core_model/stem/Conv", "Conv", &["nchw", "core_model.stem.weight", "core_model.stem.bias"], "conv")
                .message(5, ints("kernel_shape", &[3, 3]))
                .message(5, ints("strides", &[2, 2]))
                .message(5, ints("pads", &[1, 1, 1, 1]));
        let first = if planes { node("/Identity", "Identity", &["input"], "nchw") } else { transpose };
        let head: Vec<f32> = (0..tags * width).map(|i| (i % 7) as f32 / 7.0 - 0.5).collect();
        Graph {
            nodes: vec![
                first,
                conv,
                node("/core_model/stem/Relu", "Relu", &["conv"], "relu"),
                node("/core_model/pool/GlobalAveragePool", "GlobalAveragePool", &["relu"], "mean"),
                node("/core_model/pool/Flatten", "Flatten", &["mean"], POOLED).message(5, int("axis", 1)),
                node(
                    "/core_model/head/Gemm",
                    "Gemm",
                    &[POOLED, "core_model.head.weight", "core_model.head.bias"],
                    "logits",
                )
                .message(5, int("transB", 1)),
                node("/Sigmoid", "Sigmoid", &["logits"], "output"),
            ],
            weights: vec![
                tensor("core_model.stem.weight", &[width, 3, 3, 3], &self.kernel),
                tensor("core_model.stem.bias", &[width], &self.bias),
                tensor("core_model.head.weight", &[tags, width], &head),
                tensor("core_model.head.bias", &[tags], &vec![0.1; tags]),
            ],
            inputs: vec![value_info("input", FLOAT, &dims)],
            outputs: vec![value_info("output", FLOAT, &[Dim::Open("batch"), Dim::Fixed(tags as i64)])],
        }
    }

    /// The file.
    pub fn file(&self) -> Vec<u8> {
        self.graph(false).file()
    }

    /// The features of an image [side, side, 3], computed in f64.
    pub fn features(&self, image: &[f32]) -> Vec<f64> {
        let side = self.side;
        let out = side.div_ceil(2);
        let at = |y: usize, x: usize, c: usize| {
            // One row and column of zeros before the first.
            let inside = (1..=side).contains(&y) && (1..=side).contains(&x);
            if inside { f64::from(image[((y - 1) * side + x - 1) * 3 + c]) } else { 0.0 }
        };
        let value = |k: usize, y: usize, x: usize| {
            let mut sum = f64::from(self.bias[k]);
            for (c, dy, dx) in (0..27).map(|i| (i / 9, i / 3 % 3, i % 3)) {
                sum += f64::from(self.kernel[k * 27 + c * 9 + dy * 3 + dx]) * at(2 * y + dy, 2 * x + dx, c);
            }
            sum.max(0.0)
        };
        let pixels = || (0..out * out).map(|i| (i / out, i % out));
        (0..self.width).map(|k| pixels().map(|(y, x)| value(k, y, x)).sum::<f64>() / (out * out) as f64).collect()
    }
}
