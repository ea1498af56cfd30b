//! Launches of `kernels/conv_hopper.cu`: the convolutions by bulk copies and wgmma. They take the parameters of the
//! other loop's kernels and, in front of those, what the copies read. A launch says which tensor maps it needs, and a
//! device encodes them when it records the launch.

use super::launch::{DevicePtr, Launch, Precision, TensorMap, TensorMapSpec, int};
use super::structs::{HopperPixels, HopperWgrad};
use super::tiles::{Card, Choice, STEP};
use bytemuck::{NoUninit, Zeroable};
use std::mem::offset_of;

/// Which neighbours a pixel reads; `Window` of conv.cuh, of stride 1 and with a result as large as the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Taps of a row, and rows of taps.
    pub side: usize,
    /// Rows by which tap 0 lies above the pixel.
    pub up: usize,
    /// Columns by which tap 0 lies to the left of the pixel.
    pub left: usize,
}

impl Window {
    /// The window of a convolution of 9 taps or 1.
    pub fn same(taps: usize) -> Self {
        let side = if taps == 9 { 3 } else { 1 };
        Self { side, up: side / 2, left: side / 2 }
    }
}

/// Images [n, h, w, channels] at an address.
#[derive(Clone, Copy, Debug)]
pub(super) struct ImagesAt {
    pub at: DevicePtr,
    pub n: usize,
    pub h: usize,
    pub w: usize,
    pub channels: usize,
}

/// A convolution of one tap whose products are further steps of the same sum.
#[derive(Clone, Copy, Debug)]
pub(super) struct Onto {
    pub x: ImagesAt,
    /// Has no channels if there is no second input.
    pub skip: ImagesAt,
    /// `[columns][ca + cb]`.
    pub weight: DevicePtr,
    /// Factor of the sums before it.
    pub to_main: f32,
}

/// A product of pixels by channels.
#[derive(Clone, Copy, Debug)]
pub(super) struct PixelProduct {
    pub precision: Precision,
    pub x: ImagesAt,
    pub skip: Option<ImagesAt>,
    pub main: Option<Onto>,
    pub window: Window,
    /// `[columns][taps][ca + cb]`.
    pub weight: DevicePtr,
    pub columns: usize,
    /// Rows of tiles.
    pub tiles_m: usize,
}

/// The tensor map by which a copy brings 64 channels of the neighbours of `pixels` pixels.
fn images(precision: Precision, x: &ImagesAt, window: Window, pixels: usize) -> TensorMapSpec {
    let ImagesAt { at, n, h, w, channels } = *x;
    let row = 2 * channels as u64;
    if window.side == 1 {
        let (size, tile) = ([channels, n * h * w].map(int), [STEP, pixels].map(int));
        return TensorMapSpec::Tiled { at, precision, size, stride: row, tile };
    }
    let corner = [window.left, window.up].map(|x| -int::<i32>(x));
    TensorMapSpec::Im2col {
        at,
        precision,
        size: [channels, w, h, n].map(int),
        strides: [row, row * w as u64, row * (w * h) as u64],
        lower: corner,
        // The corners lie so that as many pixels are visited as the image has.
        upper: corner,
        channels: int(STEP),
        pixels: int(pixels),
    }
}

/// The bytes of two structs, one behind the other, as C lays them out if both are aligned to 64 bytes.
fn behind<A: NoUninit, P: NoUninit>(copies: &A, conv: &P) -> Vec<u8> {
    let mut bytes = [bytemuck::bytes_of(copies), bytemuck::bytes_of(conv)].concat();
    bytes.resize(bytes.len().next_multiple_of(64), 0);
    bytes
}

/// A launch of a kernel of pixels by channels; `conv` is the other loop's params struct.
pub(super) fn pixels<P: NoUninit>(kernel: String, p: &PixelProduct, choice: &Choice, card: Card, conv: &P) -> Launch {
    let Choice { tile, splits, steps_per_split } = *choice;
    let taps = p.window.side * p.window.side;
    let (ca, cb) = (p.x.channels, p.skip.map_or(0, |skip| skip.channels));
    let (main_ca, main_cb) = p.main.map_or((0, 0), |main| (main.x.channels, main.skip.channels));
    let own_steps = taps * (ca + cb) / STEP;
    let tiles_n = p.columns.div_ceil(tile.n);
    let tiles = p.tiles_m * tiles_n * splits;
    let params = HopperPixels {
        ca: int(ca),
        cb: int(cb),
        taps: int(taps),
        main_ca: int(main_ca),
        main_cb: int(main_cb),
        side: int(p.window.side),
        up: int(p.window.up),
        left: int(p.window.left),
        pixels_n: int(tiles_n),
        tiles: int(tiles),
        splits: int(splits),
        steps_per_split: int(steps_per_split),
        steps: int(own_steps + (main_ca + main_cb) / STEP),
        own_steps: int(own_steps),
        to_main: p.main.map_or(1.0, |main| main.to_main),
        ..Zeroable::zeroed()
    };
    let weight = |at, row: usize| TensorMapSpec::Tiled {
        at,
        precision: p.precision,
        size: [row, p.columns].map(int),
        stride: 2 * row as u64,
        tile: [STEP, tile.n].map(int),
    };
    let of = |x: &ImagesAt, window| images(p.precision, x, window, tile.m);
    let mut maps = vec![
        (offset_of!(HopperPixels, x), of(&p.x, p.window)),
        (offset_of!(HopperPixels, weight), weight(p.weight, taps * (ca + cb))),
    ];
    maps.extend(p.skip.map(|skip| (offset_of!(HopperPixels, skip), of(&skip, p.window))));
    if let Some(Onto { x, skip, weight: at, .. }) = p.main {
        maps.push((offset_of!(HopperPixels, main_weight), weight(at, main_ca + main_cb)));
        let inputs = [(offset_of!(HopperPixels, main_x), x), (offset_of!(HopperPixels, main_skip), skip)];
        let read = inputs.iter().filter(|(_, images)| images.channels > 0);
        maps.extend(read.map(|(place, images)| (*place, of(images, Window::same(1)))));
    }
    // Without parts a block takes many tiles in turn; with them a cluster takes one.
    let blocks = if splits > 1 { tiles } else { tiles.min(card.sms.max(1)) };
    Launch::with_maps(kernel, [blocks, 1, 1], tile.threads, tile.shared, behind(&params, conv), maps)
        .in_clusters_of(splits)
}

/// A launch of the gradient of a weight, from pixels of `x`, `skip` and `grad`.
pub(super) fn weights<P: NoUninit>(
    kernel: String,
    precision: Precision,
    (x, skip, grad): (ImagesAt, Option<ImagesAt>, ImagesAt),
    taps: usize,
    choice: &Choice,
    conv: &P,
) -> Launch {
    let Choice { tile, splits, .. } = *choice;
    let window = Window::same(taps);
    let of = |x: &ImagesAt, window| images(precision, x, window, STEP);
    let mut maps =
        vec![(offset_of!(HopperWgrad, grad), of(&grad, Window::same(1))), (offset_of!(HopperWgrad, x), of(&x, window))];
    maps.extend(skip.map(|skip| (offset_of!(HopperWgrad, skip), of(&skip, window))));
    let columns = taps * (x.channels + skip.map_or(0, |skip| skip.channels));
    let grid = [grad.channels.div_ceil(tile.m), columns.div_ceil(tile.n), splits];
    let params = behind(&[TensorMap::zeroed(); 3], conv);
    Launch::with_maps(kernel, grid, tile.threads, tile.shared, params, maps)
}
