//! What a network and the devices that compute it both need: the table of parameters, and the constants of
//! magnitude-preserving operations.
//!
//! A network is built by pushing its parameters into a table, with names and shapes as in the official `state_dict`. A
//! device allocates what the table lists and refers to it by [`ParamId`]. Files are read and written through the table
//! too, so each name stands in exactly one place.

use std::collections::HashMap;

/// Weights of a and b in `mp_sum(a, b, t)` (EDM2 eq. 88): lerp, divided by the norm of its weights.
pub fn mp_sum_weights(t: f64) -> (f64, f64) {
    let norm = ((1.0 - t) * (1.0 - t) + t * t).sqrt();
    ((1.0 - t) / norm, t / norm)
}

/// Scales of a and b in `mp_cat(a, b, t)` of widths `na` and `nb` (eq. 103).
pub fn mp_cat_scales(na: usize, nb: usize, t: f64) -> (f64, f64) {
    let (na, nb) = (na as f64, nb as f64);
    let total = ((na + nb) / ((1.0 - t) * (1.0 - t) + t * t)).sqrt();
    (total * (1.0 - t) / na.sqrt(), total * t / nb.sqrt())
}

/// Index of a parameter in its [`ParamTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub usize);

/// What a parameter is, which decides how it is normalised and stepped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// Weight of a magnitude-preserving layer: one normalised row of `cin * taps` values for
    /// each of `cout` output channels. `taps` is 9 (3x3), 1 (1x1 or linear).
    #[allow(missing_docs)]
    Weight { cout: usize, cin: usize, taps: usize },
    /// A learned scalar that starts at zero.
    Gain,
    /// Frequencies of Fourier features, N(0, (2 pi)^2); not trained.
    Freqs,
    /// Phases of Fourier features, uniform in [0, 2 pi); not trained.
    Phases,
}

/// One parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Official name, e.g. `unet.enc.64x64_block0.conv_res0.weight`.
    pub name: String,
    /// Shape in PyTorch's order: `[O,I,kh,kw]`, `[O,I]`, `[C]` or [].
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParamKind,
    /// Attention heads of a layer whose output channel `(head * c + i) * 3 + {q, k, v}` is the official
    /// order; 0 for every other parameter.
    pub heads: usize,
    /// For a convolution of an `mp_cat` that does not go through `mp_silu`: its scales. A device may multiply them into
    /// the effective weight once, instead of into the inputs each time.
    pub cat: Option<Cat>,
}

/// The parts of a concatenation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cat {
    /// Channels of the first input.
    pub split: usize,
    /// Scales of the first and the second input (eq. 103).
    pub scales: (f64, f64),
}

impl ParamSpec {
    /// Number of values.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it is the weight of a convolution, rather than of a linear layer.
    pub fn is_conv(&self) -> bool {
        self.shape.len() == 4
    }

    /// Whether it is the weight of a magnitude-preserving layer.
    pub fn is_weight(&self) -> bool {
        matches!(self.kind, ParamKind::Weight { .. })
    }

    /// Whether the optimizer changes it.
    pub fn trained(&self) -> bool {
        self.is_weight() || self.kind == ParamKind::Gain
    }
}

/// Every parameter of a network, in the order of the official `state_dict`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParamTable {
    specs: Vec<ParamSpec>,
    by_name: HashMap<String, ParamId>,
}

impl ParamTable {
    /// A 3x3 (`kernel` 3) or 1x1 (`kernel` 1) convolution.
    pub fn conv(&mut self, name: String, cin: usize, cout: usize, kernel: usize) -> ParamId {
        let kind = ParamKind::Weight { cout, cin, taps: kernel * kernel };
        self.push(format!("{name}.weight"), vec![cout, cin, kernel, kernel], kind)
    }

    /// A convolution of an `mp_cat`.
    pub fn conv_of_cat(&mut self, name: String, cin: usize, cout: usize, kernel: usize, cat: Cat) -> ParamId {
        let id = self.conv(name, cin, cout, kernel);
        self.specs[id.0].cat = Some(cat);
        id
    }

    /// The 1x1 convolution that makes q, k and v of so many heads.
    pub fn qkv(&mut self, name: String, channels: usize, heads: usize) -> ParamId {
        let id = self.conv(name, channels, 3 * channels, 1);
        self.specs[id.0].heads = heads;
        id
    }

    /// A linear layer.
    pub fn linear(&mut self, name: String, cin: usize, cout: usize) -> ParamId {
        self.push(format!("{name}.weight"), vec![cout, cin], ParamKind::Weight { cout, cin, taps: 1 })
    }

    /// A learned scalar.
    pub fn gain(&mut self, name: String) -> ParamId {
        self.push(name, vec![], ParamKind::Gain)
    }

    /// The two buffers of Fourier features.
    pub fn fourier(&mut self, name: String, channels: usize) -> (ParamId, ParamId) {
        let freqs = self.push(format!("{name}.freqs"), vec![channels], ParamKind::Freqs);
        let phases = self.push(format!("{name}.phases"), vec![channels], ParamKind::Phases);
        (freqs, phases)
    }

    fn push(&mut self, name: String, shape: Vec<usize>, kind: ParamKind) -> ParamId {
        let id = ParamId(self.specs.len());
        self.by_name.insert(name.clone(), id);
        self.specs.push(ParamSpec { name, shape, kind, heads: 0, cat: None });
        id
    }

    /// Parameters with their ids, in order.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &ParamSpec)> {
        self.specs.iter().enumerate().map(|(i, s)| (ParamId(i), s))
    }

    /// The parameter of this official name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.by_name.get(name).copied()
    }

    /// Number of parameters (tensors).
    pub fn len(&self) -> usize {
        self.specs.len()
    }

    /// Whether the table lists nothing.
    pub fn is_empty(&self) -> bool {
        self.specs.is_empty()
    }

    /// Number of trained values, as papers count parameters.
    pub fn trained_values(&self) -> usize {
        self.specs.iter().filter(|s| s.trained()).map(ParamSpec::numel).sum()
    }
}

impl std::ops::Index<ParamId> for ParamTable {
    type Output = ParamSpec;
    fn index(&self, id: ParamId) -> &ParamSpec {
        &self.specs[id.0]
    }
}

/// The gradients that a backward pass says are complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whole {
    /// Those of this convolution and all after it, in the order of the table.
    ConvsFrom(ParamId),
    /// All.
    All,
}

/// Parameters in portions that several devices sum or send at a time, in the order in which a backward pass completes
/// their gradients. Convolutions come from the end of the table. The last portion has the first convolutions and all
/// other parameters, whose gradients depend on what all blocks leave behind.
#[derive(Clone, Debug)]
pub struct Portions(Vec<Vec<ParamId>>);

impl Portions {
    /// The most values of a portion that has more than one parameter, but for the last portion: 32 MiB. Between eight
    /// cards such a sum takes 0.2 ms over NVLink and 2 ms over PCIe, many times what it takes to begin one.
    const LARGEST: usize = 8 << 20;
    /// The fewest portions, if there are as many convolutions. So a small network has little left to sum after its pass
    /// too.
    const FEWEST: usize = 16;

    /// The portions of a table.
    pub fn of(table: &ParamTable) -> Self {
        let most = Self::LARGEST.min(table.iter().map(|(_, spec)| spec.numel()).sum::<usize>() / Self::FEWEST);
        let (convs, others): (Vec<_>, Vec<_>) = table.iter().partition(|(_, spec)| spec.is_conv());
        let (mut all, mut portion, mut values) = (Vec::new(), Vec::new(), 0);
        for (id, spec) in convs.into_iter().rev() {
            if values + spec.numel() > most && !portion.is_empty() {
                all.push(std::mem::take(&mut portion));
                values = 0;
            }
            portion.push(id);
            values += spec.numel();
        }
        portion.extend(others.iter().map(|(id, _)| *id));
        all.push(portion);
        Self(all)
    }

    /// The parameters of each.
    pub fn ids(&self) -> &[Vec<ParamId>] {
        &self.0
    }

    /// How many portions are complete; these are the first ones.
    pub fn whole(&self, whole: Whole) -> usize {
        let last = self.0.len() - 1;
        match whole {
            Whole::ConvsFrom(first) => self.0[..last].partition_point(|portion| portion.iter().all(|id| *id >= first)),
            Whole::All => self.0.len(),
        }
    }
}
