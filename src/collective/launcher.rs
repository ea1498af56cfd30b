//! Who this process is among those that a launcher started, as its environment says.
//!
//! | launcher | rank, number of ranks, rank on this machine | address and port of rank 0 |
//! |---|---|---|
//! | torchrun | `RANK`, `WORLD_SIZE`, `LOCAL_RANK` | `MASTER_ADDR`; the port after `MASTER_PORT`, which torchrun keeps |
//! | Open MPI | `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK` | `MASTER_ADDR`; on one machine none is needed |
//! | Slurm | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS`, `SLURM_LOCALID` | the first of `SLURM_STEP_NODELIST` |
//!
//! The first of these whose variables are set counts; those that say that there is only one rank come last, as they may be
//! left from a notebook. Where torchrun or Open MPI say that all ranks are on this machine (`LOCAL_WORLD_SIZE`,
//! `OMPI_COMM_WORLD_LOCAL_SIZE`), they meet at 127.0.0.1, whatever `MASTER_ADDR` is. Otherwise `MASTER_ADDR` counts under
//! every launcher. So does `MASTER_PORT`, and `EDM2K_PORT` is looked at before it. To run alone within a launcher's step,
//! unset its variables.

use super::CollectiveError;

/// This process among the ranks of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Its number among those on this machine.
    pub local: usize,
    /// Name or address of the machine of rank 0.
    pub address: String,
    /// Where rank 0 listens.
    pub port: u16,
    /// What tells this run from others of its launcher.
    pub job: String,
    /// The variable that says how many ranks there are.
    pub said_by: &'static str,
}

/// The first of the ports that are derived from a job's name. They lie below those that systems give out by themselves.
const FIRST_PORT: u64 = 15_000;
const PORTS: u64 = 15_000;

impl World {
    /// What the environment of this process says; none where no launcher started it, or only this one process.
    ///
    /// # Errors
    /// [`CollectiveError::Environment`]: a variable is missing, is not a number, or is impossible.
    pub fn of_environment() -> Result<Option<Self>, CollectiveError> {
        // A value that is not UTF-8 is no number and no name.
        Self::of(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// The same for any environment, which `get` looks up.
    pub fn of(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, CollectiveError> {
        let Some(launcher) = Launcher::of(&get) else { return Ok(None) };
        let names = launcher.variables();
        let number = |name: &str, most: u64| {
            let Some(text) = get(name) else {
                let first = names.iter().find(|name| get(name).is_some()).unwrap_or(&names[0]);
                return wrong(format!("{first} is set, but {name} is not"));
            };
            let found = text.parse::<u64>().ok().filter(|&found| found <= most);
            found.map_or_else(|| wrong(format!("{name} is '{text}', expected 0 to {most}")), Ok)
        };
        let [rank, size_name, local, _] = names;
        let size = number(size_name, 1 << 16)? as usize;
        if size == 0 {
            return wrong(format!("{size_name} is 0, expected 1 or more"));
        }
        let rank = number(rank, size as u64 - 1)? as usize;
        if size == 1 {
            return Ok(None);
        }
        let local = number(local, size as u64 - 1)? as usize;
        let job = launcher.job(&get);
        let (address, port) = (launcher.address(&get)?, launcher.port(&get, &job)?);
        Ok(Some(Self { rank, size, local, address, port, job, said_by: size_name }))
    }
}

fn wrong<T>(what: String) -> Result<T, CollectiveError> {
    Err(CollectiveError::Environment(what))
}

/// Looks up a variable.
type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Launcher {
    Torchrun,
    OpenMpi,
    Slurm,
}

impl Launcher {
    /// The one that started this process: the first whose variables are set, but one of several ranks before one of one.
    fn of(get: Get) -> Option<Self> {
        let set = |name: &str| get(name).is_some();
        let is_set = |launcher: &Self| match launcher {
            Self::Torchrun => set("RANK") || set("WORLD_SIZE"),
            Self::OpenMpi => set("OMPI_COMM_WORLD_RANK"),
            // A batch script has SLURM_PROCID too. Only what srun starts is a step.
            Self::Slurm => set("SLURM_PROCID") && set("SLURM_STEP_ID"),
        };
        let all: Vec<_> = [Self::Torchrun, Self::OpenMpi, Self::Slurm].into_iter().filter(is_set).collect();
        // Variables of one rank may be left from a notebook or a script.
        let several = |launcher: &&Self| get(launcher.variables()[1]).is_none_or(|size| size != "1");
        all.iter().find(several).or(all.first()).copied()
    }

    /// Where it says the rank, the number of ranks, and the same on this machine; it need not say the last.
    fn variables(self) -> [&'static str; 4] {
        match self {
            Self::Torchrun => ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"],
            Self::OpenMpi => [
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
                "OMPI_COMM_WORLD_LOCAL_SIZE",
            ],
            Self::Slurm => ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""],
        }
    }

    /// What tells a run from others.
    fn job(self, get: Get) -> String {
        let job = ["TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID"];
        let job = job.iter().find_map(|name| Some(format!("{name}={}", get(name)?))).unwrap_or_default();
        // Under torchrun and mpirun, which may have been started by one step for each machine, it would tell ranks of one
        // run apart.
        let step = get("SLURM_STEP_ID").filter(|_| self == Self::Slurm);
        job + &step.map_or_else(String::new, |step| format!(".{step}"))
    }

    /// Name or address of the machine of rank 0.
    fn address(self, get: Get) -> Result<String, CollectiveError> {
        let [rank, size, _, here] = self.variables();
        match (get("MASTER_ADDR"), self) {
            // All are on this machine: no other needs to reach rank 0.
            _ if get(here).is_some_and(|here| Some(here) == get(size)) => Ok("127.0.0.1".into()),
            (Some(address), _) => Ok(address),
            (None, Self::Slurm) => {
                let nodes = get("SLURM_STEP_NODELIST").or_else(|| get("SLURM_JOB_NODELIST")).unwrap_or_default();
                first_node(&nodes).map_or_else(
                    || {
                        let what = "expected machines such as a[17-19],b2; MASTER_ADDR can name that of rank 0";
                        wrong(format!("SLURM_STEP_NODELIST is '{nodes}', {what}"))
                    },
                    Ok,
                )
            }
            (None, _) => {
                let what = "expected the name or address of the machine of rank 0";
                wrong(format!("{rank} is set, but MASTER_ADDR is not, {what}"))
            }
        }
    }

    /// Where rank 0 listens.
    fn port(self, get: Get, job: &str) -> Result<u16, CollectiveError> {
        let port = |name: &str| match get(name).map(|text| (text.parse::<u16>(), text)) {
            None => Ok(None),
            Some((Ok(port), _)) if port > 0 => Ok(Some(port)),
            Some((_, text)) => wrong(format!("{name} is '{text}', expected 1 to 65535")),
        };
        // torchrun's own agent listens at MASTER_PORT, and says so by one of these.
        let agent = || get("TORCHELASTIC_RUN_ID").or_else(|| get("TORCHELASTIC_USE_AGENT_STORE")).is_some();
        match (port("EDM2K_PORT")?, port("MASTER_PORT")?) {
            (Some(port), _) => Ok(port),
            (None, Some(port)) if agent() => Ok(port.checked_add(1).unwrap_or(port - 1)),
            (None, Some(port)) => Ok(port),
            (None, None) if self == Self::Torchrun => {
                wrong("RANK is set, but MASTER_PORT is not, expected a free port of the machine of rank 0".into())
            }
            // The port follows from the job's name, so other jobs on the machine get other ports.
            (None, None) => Ok((FIRST_PORT + u64::from(crc32fast::hash(job.as_bytes())) % PORTS) as u16),
        }
    }
}

/// The first machine of a list as Slurm writes it: `a17` of `a[17-19,23],b2`, `r0n4` of `r[0-1]n[4-7]`.
fn first_node(list: &str) -> Option<String> {
    let (mut name, mut rest) = (String::new(), list);
    while let Some(at) = rest.find([',', '[']) {
        name += &rest[..at];
        let Some(inner) = rest[at..].strip_prefix('[') else {
            rest = "";
            break;
        };
        let (numbers, behind) = inner.split_once(']')?;
        name += numbers.split([',', '-']).next()?;
        rest = behind;
    }
    Some(name + rest).filter(|name| !name.is_empty() && !name.contains(']'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(variables: &[(&str, &str)]) -> Result<Option<World>, String> {
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        World::of(get).map_err(|why| why.to_string())
    }

    #[test]
    fn variables_of_one_rank_count_after_those_of_several() {
        let torchrun = [("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")];
        let mpi = ["RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"].map(|name| format!("OMPI_COMM_WORLD_{name}"));
        let mpi: Vec<_> = mpi.iter().map(String::as_str).zip(["1", "2", "1", "2"]).collect();
        assert_eq!(world(&torchrun), Ok(None));
        let both = world(&[&torchrun[..], &mpi].concat()).unwrap().unwrap();
        assert_eq!((both.rank, both.size, both.said_by), (1, 2, "OMPI_COMM_WORLD_SIZE"));
    }

    fn found(variables: &[(&str, &str)]) -> (usize, usize, usize, String, u16) {
        let World { rank, size, local, address, port, .. } = world(variables).unwrap().unwrap();
        (rank, size, local, address, port)
    }

    const TORCHRUN: [(&str, &str); 6] = [
        ("RANK", "9"),
        ("WORLD_SIZE", "16"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_RUN_ID", "none"),
    ];

    #[test]
    fn every_launcher_says_who_a_rank_is() {
        assert_eq!(found(&TORCHRUN), (9, 16, 1, "node0".into(), 29501), "torchrun itself listens at MASTER_PORT");
        assert_eq!(found(&TORCHRUN[..5]), (9, 16, 1, "node0".into(), 29500), "nobody does");
        let here = |count| [&TORCHRUN[..], &[("LOCAL_WORLD_SIZE", count)]].concat();
        assert_eq!([found(&here("8")).3, found(&here("16")).3], ["node0", "127.0.0.1"], "all on one machine");
        let chosen = [&TORCHRUN[..], &[("EDM2K_PORT", "7")]].concat();
        assert_eq!(found(&chosen).4, 7);

        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_NAMESPACE", "prterun-host-7@1"),
        ];
        let (rank, size, local, address, port) = found(&mpi);
        assert_eq!((rank, size, local, &*address), (1, 2, 1, "127.0.0.1"));
        assert!((15_000..30_000).contains(&port));
        let other = [&mpi[..4], &[("PMIX_NAMESPACE", "prterun-host-8@1")]].concat();
        assert_ne!(found(&other).4, port, "another job, another port");

        let slurm = [
            ("SLURM_PROCID", "5"),
            ("SLURM_STEP_NUM_TASKS", "8"),
            ("SLURM_NTASKS", "99"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_JOB_ID", "4711"),
            ("SLURM_STEP_NODELIST", "gpu[017-018,020]"),
        ];
        let (rank, size, local, address, _) = found(&slurm);
        assert_eq!((rank, size, local, &*address), (5, 8, 1, "gpu017"));
        // Within a job of Slurm's, torchrun and mpirun are the ones that started it.
        assert_eq!(found(&[&slurm[..], &TORCHRUN].concat()).0, 9);
        assert_eq!(found(&[&slurm[..], &mpi].concat()).0, 1);
    }

    #[test]
    fn a_step_of_slurms_tells_jobs_apart_where_it_started_the_ranks() {
        let job = |variables: &[(&str, &str)], step| {
            let all = [variables, &[("SLURM_JOB_ID", "4711"), ("SLURM_STEP_ID", step)]].concat();
            world(&all).unwrap().unwrap().job
        };
        let of_srun = [
            ("SLURM_PROCID", "1"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_NODELIST", "a"),
        ];
        assert_eq!(job(&of_srun, "3"), "SLURM_JOB_ID=4711.3");
        // A torchrun on each machine, by a step of its own; and by a script's own launcher.
        assert_eq!(job(&TORCHRUN, "0"), job(&TORCHRUN, "1"));
        assert_eq!(job(&TORCHRUN[..5], "0"), "SLURM_JOB_ID=4711");
    }

    #[test]
    fn one_process_is_no_rank() {
        assert_eq!(world(&[]), Ok(None));
        assert_eq!(world(&[("RANK", "0"), ("WORLD_SIZE", "1")]), Ok(None));
        // A script that sbatch runs, of a job with 8 tasks.
        assert_eq!(world(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_JOB_ID", "1")]), Ok(None));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let with = |name: &'static str, value: &'static str| {
            let mut all: Vec<_> = TORCHRUN.iter().filter(|(key, _)| *key != name).copied().collect();
            all.extend((!value.is_empty()).then_some((name, value)));
            world(&all).unwrap_err()
        };
        assert_eq!(with("WORLD_SIZE", ""), "RANK is set, but WORLD_SIZE is not");
        assert_eq!(with("RANK", ""), "WORLD_SIZE is set, but RANK is not");
        assert_eq!(with("LOCAL_RANK", ""), "RANK is set, but LOCAL_RANK is not");
        assert_eq!(with("RANK", "16"), "RANK is '16', expected 0 to 15");
        assert_eq!(with("RANK", "-1"), "RANK is '-1', expected 0 to 15");
        assert_eq!(with("WORLD_SIZE", "0"), "WORLD_SIZE is 0, expected 1 or more");
        assert_eq!(with("WORLD_SIZE", "many"), "WORLD_SIZE is 'many', expected 0 to 65536");
        assert!(with("MASTER_ADDR", "").starts_with("RANK is set, but MASTER_ADDR is not"));
        assert!(with("MASTER_PORT", "").starts_with("RANK is set, but MASTER_PORT is not"));
        assert_eq!(with("MASTER_PORT", "70000"), "MASTER_PORT is '70000', expected 1 to 65535");
        let apart = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
        ];
        assert!(world(&apart).unwrap_err().contains("MASTER_ADDR is not"), "two machines");
        let of_srun =
            [("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_LOCALID", "0"), ("SLURM_STEP_ID", "0")];
        let said = world(&[&of_srun[..], &[("SLURM_STEP_NODELIST", "gpu[1")]].concat()).unwrap_err();
        assert_eq!(
            said,
            "SLURM_STEP_NODELIST is 'gpu[1', expected machines such as a[17-19],b2; MASTER_ADDR can name that of rank 0"
        );
    }

    #[test]
    fn the_first_machine_of_a_list_of_slurms() {
        let of = |list| first_node(list);
        assert_eq!(of("node7").as_deref(), Some("node7"));
        assert_eq!(of("a,b").as_deref(), Some("a"));
        assert_eq!(of("gpu[017-018,020],x").as_deref(), Some("gpu017"));
        assert_eq!(of("r[3,5]-ib").as_deref(), Some("r3-ib"));
        assert_eq!(of("r[0-1]n[0-3]").as_deref(), Some("r0n0"));
        assert_eq!(of("r[2,4]n[08-11]-ib,x").as_deref(), Some("r2n08-ib"));
        assert_eq!(of("gpu7],x"), None);
        assert_eq!(of(""), None);
        assert_eq!(of("gpu[1"), None);
    }
}
