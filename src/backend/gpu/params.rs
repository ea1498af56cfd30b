//! Parameters in device memory: where each lies in the arenas of weights, gradients, moments and averages, and how
//! values come from PyTorch's order into the kernels' and back.
//!
//! A weight is stored as rows `[cout][tap][cin]`, cin padded with zeros to a multiple of 8, so that rows are
//! what is normalised and what the convolutions read; after the last row there is room up to a multiple of 8
//! rows, which stays zero. Rows of a qkv layer are in the order of [`attention::row_of`].
//!
//! Convolutions come last in an arena, in the table's order: so each of the [`Portions`] is one range of it.

use std::collections::HashMap;
use std::rc::Rc;

use rayon::prelude::*;

use super::attention;
use super::embedding::{ScaleLayer, ScaleTable};
use super::launch::{DevicePtr, Launch, Precision, int};
use super::runtime::{Command, Graph, Memory, PARAMETERS, Runtime};
use super::structs::{StepScalars, StepTotals, TurnTile, WeightEffective, WeightRow, WeightStep, WeightTurn};
use super::tensor::padded;
use super::weights::{self, RowTable, Turned};
use crate::backend::{BackendError, DeviceError, EmbLayer, Normalization, OptimizerStep, Slot, StepStats, Values};
use crate::params::{ParamId, ParamKind, ParamSpec, ParamTable, Portions};
use bytemuck::Zeroable;

/// The fewest values that a thread reorders at a time.
const SHARE: usize = 1 << 15;

/// Where one parameter lies.
#[derive(Clone, Copy, Debug)]
struct ParamPlace {
    /// Its first value in the f32 arenas and, for weights, among the effective ones.
    first: usize,
    /// Its first value among the exact ones, for gains and buffers.
    exact: usize,
    rows: usize,
    taps: usize,
    cin: usize,
    heads: usize,
    weight: bool,
    /// Where the channels have two scales: the first channel of the second, and both.
    split: usize,
    scales: [f32; 2],
}

impl ParamPlace {
    /// Values from one row to the next.
    fn stride(&self) -> usize {
        if self.weight { self.taps * padded(self.cin) } else { padded(self.cin) }
    }

    /// Values of a row in PyTorch's order, `[cin][tap]`.
    fn official(&self) -> usize {
        self.cin * self.taps
    }

    /// The fewest rows that a thread takes at a time.
    fn share(&self) -> usize {
        (SHARE / self.stride()).max(1)
    }

    /// Values in PyTorch's order as they are stored.
    fn store(&self, values: &[f32]) -> Vec<f32> {
        let Self { rows, taps, cin, heads, .. } = *self;
        let mut stored = vec![0.0; rows * self.stride()];
        stored.par_chunks_mut(self.stride()).enumerate().with_min_len(self.share()).for_each(|(at, to)| {
            let row = if heads > 0 { attention::row_at(at, heads, rows / 3 / heads) } else { at };
            let from = &values[row * self.official()..][..self.official()];
            for (tap, to) in to.chunks_mut(padded(cin)).enumerate() {
                to.iter_mut().zip(from[tap..].iter().step_by(taps)).for_each(|(to, &x)| *to = x);
            }
        });
        stored
    }

    /// Stored values in PyTorch's order.
    fn restore(&self, stored: &[f32]) -> Vec<f32> {
        let Self { rows, taps, cin, heads, .. } = *self;
        let mut values = vec![0.0; rows * self.official()];
        values.par_chunks_mut(self.official()).enumerate().with_min_len(self.share()).for_each(|(row, to)| {
            let at = if heads > 0 { attention::row_of(row, heads, rows / 3 / heads) } else { row };
            let from = &stored[at * self.stride()..][..self.stride()];
            for (tap, from) in from.chunks(padded(cin)).enumerate() {
                to[tap..].iter_mut().step_by(taps).zip(from).for_each(|(to, &x)| *to = x);
            }
        });
        values
    }
}

/// What only training needs.
struct OptimizerState {
    grad: Rc<dyn Memory>,
    m: Rc<dyn Memory>,
    v: Rc<dyn Memory>,
    emas: Vec<Rc<dyn Memory>>,
    rows: RowTable,
    rows_memory: Rc<dyn Memory>,
    scalars: Rc<dyn Memory>,
    stats: Rc<dyn Memory>,
    totals: Rc<dyn Memory>,
    /// The graph of the optimizer's step, by the step's number of rounds.
    graphs: HashMap<usize, Box<dyn Graph>>,
}

/// Transposed and turned copies of the convolutions' effective weights, for the gradients of their inputs.
struct TurnedWeights {
    memory: Rc<dyn Memory>,
    /// First value of each parameter's copy.
    first: Vec<usize>,
    tiles: Rc<dyn Memory>,
    count: usize,
}

/// A table on the host and on the device.
type TwoSided<T> = (Rc<T>, Rc<dyn Memory>);

/// Every parameter of a network, and its training state.
pub struct Params {
    table: ParamTable,
    portions: Portions,
    places: Vec<ParamPlace>,
    precision: Precision,
    /// Values of each f32 arena.
    values: usize,
    weight: Rc<dyn Memory>,
    effective: Rc<dyn Memory>,
    exact: Rc<dyn Memory>,
    all_rows: RowTable,
    all_rows_memory: Rc<dyn Memory>,
    turned: Option<TurnedWeights>,
    training: Option<OptimizerState>,
    /// The tables of `emb_linear` layers, by the layers' weights.
    scale_tables: HashMap<Vec<ParamId>, TwoSided<ScaleTable>>,
}

/// The place of a parameter; where it begins is filled in later.
fn place(spec: &ParamSpec) -> ParamPlace {
    let (first, exact) = (0, 0);
    match spec.kind {
        ParamKind::Weight { cout, cin, taps } => {
            let split = spec.cat.map_or(cin, |cat| cat.split);
            let scales = spec.cat.map_or([1.0; 2], |cat| [cat.scales.0 as f32, cat.scales.1 as f32]);
            ParamPlace { first, exact, rows: cout, taps, cin, heads: spec.heads, weight: true, split, scales }
        }
        _ => {
            let cin = spec.numel();
            ParamPlace { first, exact, rows: 1, taps: 1, cin, heads: 0, weight: false, split: cin, scales: [1.0; 2] }
        }
    }
}

fn rows_of(p: &ParamPlace) -> impl Iterator<Item = WeightRow> + use<> {
    let p = *p;
    let (length, fan_in) = (p.stride(), if p.weight { p.taps * p.cin } else { 0 });
    let effective = if p.weight { p.first } else { p.exact };
    (0..p.rows).map(move |row| WeightRow {
        first: int(p.first + row * length),
        effective: int(effective + row * length),
        length: int(length),
        fan_in: int(fan_in),
        cin: int(padded(p.cin)),
        split: int(if p.split == p.cin { padded(p.cin) } else { p.split }),
        scales: p.scales,
    })
}

fn filled(runtime: &dyn Runtime, bytes: usize) -> Result<Rc<dyn Memory>, DeviceError> {
    let memory = runtime.allocate(bytes, PARAMETERS)?;
    // SAFETY: the whole of the memory just allocated.
    unsafe { runtime.run(&Command::Zero { at: memory.ptr(), bytes })? };
    Ok(memory)
}

fn uploaded<T: bytemuck::NoUninit>(runtime: &dyn Runtime, values: &[T]) -> Result<Rc<dyn Memory>, DeviceError> {
    let bytes: &[u8] = bytemuck::cast_slice(values);
    let memory = runtime.allocate(bytes.len(), PARAMETERS)?;
    memory.write(0, bytes)?;
    Ok(memory)
}

/// Memory for the copies, and the table that the kernel reads.
fn turned_weights(
    runtime: &dyn Runtime,
    table: &ParamTable,
    places: &[ParamPlace],
) -> Result<TurnedWeights, DeviceError> {
    let (mut values, mut first, mut tiles) = (0, Vec::new(), Vec::<TurnTile>::new());
    for ((_, spec), p) in table.iter().zip(places) {
        first.push(values);
        if spec.is_conv() {
            let weight = Turned { from: p.first, to: values, cout: padded(p.rows), cin: padded(p.cin), taps: p.taps };
            values += weight.cout * weight.cin * weight.taps;
            tiles.extend(weight.tiles());
        }
    }
    let memory = runtime.allocate(values * 2, PARAMETERS)?;
    Ok(TurnedWeights { memory, first, count: tiles.len(), tiles: uploaded(runtime, &tiles)? })
}

impl Params {
    /// Memory for every parameter, all zero. If `emas` is given, also for gradients, moments and so many averages.
    pub fn new(
        runtime: &dyn Runtime,
        precision: Precision,
        table: &ParamTable,
        emas: Option<usize>,
    ) -> Result<Self, DeviceError> {
        if let Some(found) = emas.filter(|&emas| emas > weights::MAX_EMAS) {
            return Err(DeviceError::Averages { found, most: weights::MAX_EMAS });
        }
        let (mut values, mut exact) = (0, 0);
        let mut places: Vec<ParamPlace> = table.iter().map(|(_, spec)| place(spec)).collect();
        for convs in [false, true] {
            for ((_, spec), p) in table.iter().zip(&mut places).filter(|((_, spec), _)| spec.is_conv() == convs) {
                if p.stride() > weights::MAX_ROW {
                    let (name, found, most) = (&spec.name, p.stride(), weights::MAX_ROW);
                    return Err(DeviceError::Unavailable(format!("{name}: rows of {found} values, at most {most}")));
                }
                (p.first, p.exact) = (values, exact);
                values += padded(p.rows) * p.stride();
                exact += if p.weight { 0 } else { p.stride() };
            }
        }
        let all_rows = RowTable::new(places.iter().flat_map(rows_of).collect());
        let training = match emas {
            None => None,
            Some(emas) => {
                let trained = table.iter().zip(&places).filter(|((_, spec), _)| spec.trained());
                let rows = RowTable::new(trained.flat_map(|(_, p)| rows_of(p)).collect());
                let arena = || filled(runtime, values * 4);
                Some(OptimizerState {
                    grad: arena()?,
                    m: arena()?,
                    v: arena()?,
                    emas: (0..emas).map(|_| arena()).collect::<Result<_, _>>()?,
                    rows_memory: uploaded(runtime, rows.rows())?,
                    scalars: runtime.allocate(size_of::<StepScalars>(), PARAMETERS)?,
                    stats: runtime.allocate(8 * rows.rows().len(), PARAMETERS)?,
                    totals: runtime.allocate(size_of::<StepTotals>(), PARAMETERS)?,
                    rows,
                    graphs: HashMap::new(),
                })
            }
        };
        let turned = training.is_some().then(|| turned_weights(runtime, table, &places)).transpose()?;
        Ok(Self {
            table: table.clone(),
            portions: Portions::of(table),
            precision,
            values,
            weight: filled(runtime, values * 4)?,
            effective: filled(runtime, values * 2)?,
            exact: filled(runtime, exact * 4)?,
            all_rows_memory: uploaded(runtime, all_rows.rows())?,
            all_rows,
            turned,
            training,
            scale_tables: HashMap::new(),
            places,
        })
    }

    /// The table.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// The ranges of the arenas that [`Params::exchange`] gives out at a time.
    pub fn portions(&self) -> &Portions {
        &self.portions
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        let arenas = 1 + self.training.as_ref().map_or(0, |t| 3 + t.emas.len());
        self.values * (4 * arenas + 2) + self.turned.as_ref().map_or(0, |turned| turned.memory.bytes())
    }

    /// [rows, channels of a row, taps] of a weight, without padding.
    pub fn dims(&self, id: ParamId) -> [usize; 3] {
        let p = &self.places[id.0];
        [p.rows, p.cin, p.taps]
    }

    /// Heads of a qkv layer, else 0.
    pub fn heads(&self, id: ParamId) -> usize {
        self.places[id.0].heads
    }

    /// A weight's effective values, 16 bits.
    pub fn effective(&self, id: ParamId) -> DevicePtr {
        self.effective.ptr().offset(self.first(id) * 2)
    }

    /// Bytes of a weight's effective values.
    pub fn effective_bytes(&self, id: ParamId) -> usize {
        self.places[id.0].rows * self.places[id.0].stride() * 2
    }

    /// A convolution's effective weight, turned as [`super::conv::Dgrad`] reads it. A network for sampling makes the
    /// copies at the first call.
    pub fn turned(&mut self, runtime: &dyn Runtime, id: ParamId) -> Result<DevicePtr, DeviceError> {
        if self.turned.is_none() {
            self.turned = Some(turned_weights(runtime, &self.table, &self.places)?);
            self.turn(runtime)?;
        }
        let turned = self.turned.as_ref().expect("made above");
        Ok(turned.memory.ptr().offset(turned.first[id.0] * 2))
    }

    /// The launch that writes the turned copies, if there are any.
    fn turning(&self) -> Option<Launch> {
        let TurnedWeights { memory, tiles, count, .. } = self.turned.as_ref().filter(|turned| turned.count > 0)?;
        let memory = WeightTurn { tiles: tiles.ptr(), effective: self.effective.ptr(), turned: memory.ptr() };
        Some(weights::turn(*count, memory))
    }

    fn turn(&self, runtime: &dyn Runtime) -> Result<(), DeviceError> {
        // SAFETY: the tiles are those of the places in both arenas.
        self.turning().map_or(Ok(()), |launch| unsafe { runtime.run(&launch.into()) })
    }

    /// A gain's or buffer's values, f32.
    pub fn exact(&self, id: ParamId) -> DevicePtr {
        self.exact.ptr().offset(self.first_exact(id) * 4)
    }

    /// Where the gradient of the effective values is accumulated, f32.
    ///
    /// # Panics
    /// If the network was loaded for sampling only.
    pub fn grad(&self, id: ParamId) -> DevicePtr {
        self.all_grads().offset(self.first(id) * 4)
    }

    /// The arena of effective weights.
    pub fn all_effective(&self) -> DevicePtr {
        self.effective.ptr()
    }

    /// The arena of gains and buffers.
    pub fn all_exact(&self) -> DevicePtr {
        self.exact.ptr()
    }

    /// The arena of gradients, in which a parameter begins at [`Params::first`].
    ///
    /// # Panics
    /// As [`Params::grad`].
    pub fn all_grads(&self) -> DevicePtr {
        self.training.as_ref().expect("gradients of a network that was loaded for training").grad.ptr()
    }

    /// A parameter's first value in the f32 arenas; a weight's among the effective ones too.
    pub fn first(&self, id: ParamId) -> usize {
        self.places[id.0].first
    }

    /// A gain's or buffer's first value among the exact ones.
    pub fn first_exact(&self, id: ParamId) -> usize {
        self.places[id.0].exact
    }

    fn arena(&self, slot: Slot) -> Result<&Rc<dyn Memory>, BackendError> {
        let training = self.training.as_ref();
        let memory = match slot {
            Slot::Weight => Some(&self.weight),
            Slot::Grad => training.map(|t| &t.grad),
            Slot::AdamM => training.map(|t| &t.m),
            Slot::AdamV => training.map(|t| &t.v),
            Slot::Ema(i) => training.and_then(|t| t.emas.get(i)),
        };
        memory.ok_or(BackendError::NotTraining(slot))
    }

    /// See [`crate::backend::TrainingBackend::write_param`].
    pub fn write(&mut self, slot: Slot, id: ParamId, values: &[f32]) -> Result<(), BackendError> {
        let spec = &self.table[id];
        if values.len() != spec.numel() {
            let (found, expected) = (values.len(), spec.numel());
            return Err(BackendError::ParamSize { name: spec.name.clone(), found, expected });
        }
        let p = &self.places[id.0];
        Ok(self.arena(slot)?.write(p.first * 4, bytemuck::cast_slice(&p.store(values)))?)
    }

    /// See [`crate::backend::TrainingBackend::read_param`].
    pub fn read(&mut self, slot: Slot, id: ParamId) -> Result<Vec<f32>, BackendError> {
        let p = &self.places[id.0];
        let mut stored = vec![0.0f32; p.rows * p.stride()];
        self.arena(slot)?.read(p.first * 4, bytemuck::cast_slice_mut(&mut stored))?;
        Ok(p.restore(&stored))
    }

    /// See [`crate::backend::TrainingBackend::exchange`].
    pub fn exchange(&self, slot: Slot, portion: usize, exchange: &mut dyn FnMut(Values)) -> Result<(), BackendError> {
        let first = |portion: &Vec<ParamId>| portion.iter().map(|&id| self.first(id)).min().unwrap_or(self.values);
        let portions = self.portions.ids();
        let end = portion.checked_sub(1).map_or(self.values, |before| first(&portions[before]));
        exchange(Values::Device(&**self.arena(slot)?, 4 * first(&portions[portion])..4 * end));
        Ok(())
    }

    /// See [`crate::backend::TrainingBackend::make_effective`].
    pub fn make_effective(
        &mut self,
        runtime: &dyn Runtime,
        slot: Slot,
        how: Normalization,
    ) -> Result<(), BackendError> {
        let memory = WeightEffective {
            rows: self.all_rows_memory.ptr(),
            source: self.arena(slot)?.ptr(),
            effective: self.effective.ptr(),
            exact: self.exact.ptr(),
            ..Zeroable::zeroed()
        };
        for launch in weights::make_effective(self.precision, &self.all_rows, how, memory) {
            // SAFETY: the arenas have the rows of the table.
            unsafe { runtime.run(&launch.into())? };
        }
        Ok(self.turn(runtime)?)
    }

    /// Clears the gradients.
    pub fn clear_grads(&self) -> Option<Command> {
        self.training.as_ref().map(|t| Command::Zero { at: t.grad.ptr(), bytes: self.values * 4 })
    }

    /// The table of the `emb_linear` layers and its address; a network has one.
    pub fn scale_table(
        &mut self,
        runtime: &dyn Runtime,
        layers: &[EmbLayer],
    ) -> Result<(Rc<ScaleTable>, DevicePtr), DeviceError> {
        let key: Vec<ParamId> = layers.iter().map(|layer| layer.weight).collect();
        if let Some((table, memory)) = self.scale_tables.get(&key) {
            return Ok((table.clone(), memory.ptr()));
        }
        let emb_channels = layers.first().map_or(0, |layer| self.dims(layer.weight)[1]);
        let place = |layer: &EmbLayer| ScaleLayer {
            weight: self.first(layer.weight),
            grad: self.first(layer.weight),
            gain: self.first_exact(layer.gain),
            gain_grad: self.first(layer.gain),
            offset: layer.offset,
            channels: layer.channels,
        };
        let table = Rc::new(ScaleTable::new(emb_channels, &layers.iter().map(place).collect::<Vec<_>>()));
        let memory = uploaded(runtime, table.tiles())?;
        let at = memory.ptr();
        self.scale_tables.insert(key, (table.clone(), memory));
        Ok((table, at))
    }

    /// See [`crate::backend::TrainingBackend::optimizer_step`].
    pub fn step(&mut self, runtime: &dyn Runtime, step: &OptimizerStep) -> Result<StepStats, BackendError> {
        let turning = self.turning();
        let t = self.training.as_mut().ok_or(BackendError::NotTraining(Slot::Grad))?;
        step.check(t.emas.len());
        t.scalars.write(0, bytemuck::bytes_of(&StepScalars::new(step)))?;
        if !t.graphs.contains_key(&step.rounds) {
            let mut emas = [DevicePtr::NULL; weights::MAX_EMAS];
            emas.iter_mut().zip(&t.emas).for_each(|(to, ema)| *to = ema.ptr());
            let memory = WeightStep {
                rows: t.rows_memory.ptr(),
                scalars: t.scalars.ptr(),
                weight: self.weight.ptr(),
                grad: t.grad.ptr(),
                m: t.m.ptr(),
                v: t.v.ptr(),
                emas,
                effective: self.effective.ptr(),
                exact: self.exact.ptr(),
                stats: t.stats.ptr(),
                ema_count: int(t.emas.len()),
                rounds: int(step.rounds),
            };
            let mut launches = weights::step(self.precision, &t.rows, memory, t.totals.ptr());
            launches.extend(turning);
            // SAFETY: the arenas have the rows of the table and live as long as the graph.
            let graph = unsafe { runtime.record(launches.into_iter().map(Command::from).collect(), false)? };
            t.graphs.insert(step.rounds, graph);
        }
        t.graphs[&step.rounds].run()?;
        let mut totals = [0u8; size_of::<StepTotals>()];
        t.totals.read(0, &mut totals)?;
        let totals: StepTotals = bytemuck::pod_read_unaligned(&totals);
        Ok(StepStats { grad_norm: totals.grad_norm, nonfinite: totals.nonfinite })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_values_lie_in_the_kernels_rows_and_come_back() {
        // A convolution, a linear layer, one of two heads' q, k and v, and a vector.
        for (rows, cin, taps, heads, weight) in
            [(10, 13, 9, 0, true), (7, 24, 1, 0, true), (2 * 3 * 5, 11, 1, 2, true), (1, 19, 1, 0, false)]
        {
            let p = ParamPlace { first: 0, exact: 0, rows, taps, cin, heads, weight, split: cin, scales: [1.0; 2] };
            let values: Vec<f32> = (0..rows * cin * taps).map(|i| i as f32 + 0.5).collect();
            let mut want = vec![0.0; rows * p.stride()];
            for (i, &value) in values.iter().enumerate() {
                let (row, c, tap) = (i / taps / cin, i / taps % cin, i % taps);
                let at = if heads > 0 { attention::row_of(row, heads, rows / 3 / heads) } else { row };
                want[at * p.stride() + tap * padded(cin) + c] = value;
            }
            assert_eq!(p.store(&values), want, "{p:?}");
            assert_eq!(p.restore(&want), values, "{p:?}");
        }
    }
}
