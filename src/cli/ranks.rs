//! Commands that several processes do together, as a launcher started them: `torchrun`, `srun`, `mpirun`.

use std::time::Duration;

use anyhow::{bail, ensure};
use indicatif::ProgressBar;

use edm2k::collective::{Alone, Collective, LONGEST, Part, Patience, Star, World, agree, limit};
use edm2k::system::host_name;
use edm2k::{Device, DeviceName};

use super::DeviceArgs;
use super::advice::in_one_line;
use super::say::{self, note};

/// This process among those that a launcher started with it, and how it reaches them.
pub struct Ranks {
    /// Which of them it is; none if there are no others.
    world: Option<World>,
    met: Box<dyn Collective>,
}

/// An identifier that no other card has, and a name for people; `None` for what is no card.
type CardName = Option<(String, String)>;

/// The kind of a device, by which ranks decide how they sum: only beside NVIDIA's is there a queue for NCCL.
fn kind(device: &Device) -> &'static str {
    match device.runtime() {
        Some(runtime) if runtime.is_card() => "a GPU",
        Some(_) => "the emulator",
        None => "the CPU",
    }
}

/// Which two ranks have the same card, if there are such.
fn one_card_twice(cards: &[CardName]) -> Option<String> {
    let (second, (card, first)) = cards.iter().enumerate().find_map(|(second, card)| {
        let card = card.as_ref()?;
        let same = |other: &CardName| other.as_ref().is_some_and(|other| other.0 == card.0);
        Some((second, (card, cards[..second].iter().position(same)?)))
    })?;
    let what = "start one for each card, or let each see another (CUDA_VISIBLE_DEVICES)";
    Some(format!("rank {first} and rank {second} have the same card, {}: {what}", card.1))
}

/// Does a `command`'s work with the ranks that a launcher started, if one did. If this one fails, the others are told
/// why. A rank that is lost ends this process.
pub fn together<T>(command: &str, work: impl FnOnce(&mut Ranks) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let world = World::of_environment()?;
    let met: Box<dyn Collective> = match &world {
        None => Box::new(Alone),
        Some(world) => {
            let trains = command == "train";
            let patience = Patience {
                meet: limit()?,
                // Ranks that train do the same at the same time; of the others one may be hours behind, and gives signs of life.
                wait: trains.then_some(LONGEST),
                // A checkpoint that is being written may be whole by then. Others write small files.
                alone: Duration::from_secs(if trains { 50 } else { 10 }),
            };
            let lost = |who: &str| {
                note!("edm2k: error: {who}");
                std::process::exit(1);
            };
            Box::new(Star::join(world.clone(), patience, &mut |text| note!("{text}"), lost)?)
        }
    };
    let mut ranks = Ranks { world, met };
    let other = |ours: &str, theirs: &str| format!("it was told to {theirs}, rank 0 to {ours}");
    let done = agree(ranks.met(), command, other).map_err(Into::into).and_then(|()| work(&mut ranks));
    let failed = done.as_ref().err().map(in_one_line);
    ranks.met.leave(failed.as_deref());
    done
}

impl Ranks {
    /// The connection between them, once they have met.
    pub fn met(&mut self) -> &mut dyn Collective {
        &mut *self.met
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.met.size()
    }

    /// Whether this is the one that speaks and writes for all.
    pub fn first(&self) -> bool {
        self.met.rank() == 0
    }

    /// Says on stderr what goes for all of them, which were given the same: the first of them does.
    pub fn say(&self, text: &str) {
        if self.first() {
            note!("{text}");
        }
    }

    /// The same of a warning.
    pub fn warn(&self, text: &str) {
        self.say(&format!("warning: {text}"));
    }

    /// This process's part of the work: by its rank, or the part that somebody `asked` for.
    ///
    /// # Errors
    /// `--part` was given although a launcher started several ranks.
    pub fn part(&self, asked: Option<Part>) -> anyhow::Result<Part> {
        match asked {
            Some(part) if self.size() == 1 => Ok(part),
            Some(_) => bail!("--part: a launcher has started {} ranks, each for its part", self.size()),
            None => Ok(self.met.part()),
        }
    }

    /// A bar that the first of them shows for all ([`say::bar`]).
    pub fn bar(&self, length: u64, template: &str) -> ProgressBar {
        if self.first() { say::bar(length, template) } else { ProgressBar::hidden() }
    }

    /// Opens the device: of several cards the one with this rank's number on its machine. All ranks do so together.
    ///
    /// # Errors
    /// As [`DeviceArgs::open`]; there are fewer cards than ranks, two of them have one card, or they have different kinds of
    /// devices.
    pub fn open(&mut self, args: &DeviceArgs) -> anyhow::Result<Device> {
        args.heeded(self.open_to_plan(args)?)
    }

    /// The same for who only plans, and plans for GPUs on a CPU too: its options may be those of GPUs.
    ///
    /// # Errors
    /// As [`Ranks::open`], but for such options.
    pub fn open_to_plan(&mut self, args: &DeviceArgs) -> anyhow::Result<Device> {
        let Some(World { local, .. }) = self.world else { return args.open_as(args.device) };
        let device = match args.device {
            DeviceName::Auto | DeviceName::Cuda(0) => match Device::cards() {
                // There is no card, or only the one that the launcher lets this rank see.
                0 | 1 => args.device,
                cards => {
                    ensure!(local < cards, "this is rank number {local} of this machine, which shows it {cards} GPUs");
                    DeviceName::Cuda(local)
                }
            },
            other => other,
        };
        let device = args.open_as(device)?;
        agree(self.met(), kind(&device), |ours, theirs| format!("it computes on {theirs}, rank 0 on {ours}"))?;
        let card = device.runtime().and_then(|gpu| {
            let name = format!("{} of {}", gpu.name(), host_name().unwrap_or_else(|| "one machine".into()));
            Some((gpu.uuid()?, name))
        });
        let said = self.met().gather(&serde_json::to_vec(&card)?)?;
        let cards = said.iter().map(|card| serde_json::from_slice(card)).collect::<Result<Vec<_>, _>>()?;
        match one_card_twice(&cards) {
            Some(twice) => bail!("{twice}"),
            None => Ok(device),
        }
    }

    /// From here on, gradients are summed between the cards by NCCL. On other devices they are summed by way of rank 0,
    /// which is for tests. That all ranks have one kind of device, [`open`](Self::open) has seen to.
    ///
    /// # Errors
    /// There is no NCCL.
    pub fn connect(&mut self, device: &Device) -> anyhow::Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if let Some(beside) = device.runtime().map(|runtime| runtime.beside()).transpose()?.flatten() {
            let met = std::mem::replace(&mut self.met, Box::new(Alone));
            self.met = Box::new(edm2k::collective::Nccl::new(met, beside)?);
            return Ok(());
        }
        if self.first() {
            let (ranks, kind) = (self.size(), kind(device));
            note!("{ranks} ranks on {kind}: gradients go through rank 0, which is for tests; GPUs use NCCL");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ranks_on_one_card_are_named() {
        let card = |uuid: &str| Some((uuid.to_owned(), "a card (cuda:0) of m7".to_owned()));
        assert_eq!(one_card_twice(&[card("a"), card("b"), None, None]), None);
        let said = one_card_twice(&[None, card("a"), card("b"), card("a")]).unwrap();
        let expected = "rank 1 and rank 3 have the same card, a card (cuda:0) of m7: start one for each card, ";
        assert!(said.starts_with(expected), "{said}");
    }
}
