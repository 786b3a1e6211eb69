//! Samples, and what a process has used.

use crossdock_replay::quantile;

/// Values of one kind, measured one after the other.
#[derive(Clone, Debug, Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Adds a value.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The values, in the order in which they came.
    pub fn values(&self) -> &[f64] {
        &self.0
    }

    /// The middle one, of an even number the lower; 0 of none.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The least value that this share of the values does not exceed; 0 of none.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        quantile(&sorted, share)
    }

    /// The smallest; 0 of none.
    pub fn min(&self) -> f64 {
        self.quantile(0.0)
    }

    /// The largest; 0 of none.
    pub fn max(&self) -> f64 {
        self.quantile(1.0)
    }

    /// The median of the ratios of values that were measured next to each other: what a busy machine disturbs least.
    pub fn median_ratio(&self, to: &Sample) -> f64 {
        Sample(self.0.iter().zip(&to.0).map(|(one, other)| one / other).collect()).median()
    }
}

impl FromIterator<f64> for Sample {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        Self(values.into_iter().collect())
    }
}

impl Extend<f64> for Sample {
    fn extend<T: IntoIterator<Item = f64>>(&mut self, values: T) {
        self.0.extend(values);
    }
}

/// Seconds that all threads of this process have run, in the program and in the kernel.
pub fn cpu_seconds() -> f64 {
    let ticks = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    ticks.tv_sec as f64 + ticks.tv_nsec as f64 * 1e-9
}

/// How often the threads of this process that have this name have gone to sleep by themselves, so far.
pub fn sleeps(thread: &str) -> std::io::Result<u64> {
    let mut sleeps = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let path = task?.path();
        if std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == thread) {
            sleeps += sleeps_of(&path)?;
        }
    }
    Ok(sleeps)
}

/// How often the calling thread has gone to sleep by itself, so far.
pub fn sleeps_here() -> std::io::Result<u64> {
    sleeps_of("/proc/thread-self".as_ref())
}

fn sleeps_of(task: &std::path::Path) -> std::io::Result<u64> {
    let status = std::fs::read_to_string(task.join("status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Ok(line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_sample() {
        let mut sample = Sample::default();
        assert_eq!(sample.median(), 0.0);
        sample.extend([3.0, 1.0, 2.0]);
        assert_eq!((sample.min(), sample.median(), sample.max()), (1.0, 2.0, 3.0));
        assert_eq!((sample.quantile(0.66), sample.quantile(0.67)), (2.0, 3.0));
        let mut half = Sample::default();
        half.extend([6.0, 4.0, 2.0]);
        assert_eq!(sample.median_ratio(&half), 0.5);
    }

    #[test]
    fn sleeps_of_a_thread_are_counted() {
        let counted = std::thread::Builder::new().name("sleeper".into()).spawn(|| {
            let (before, before_here) = (sleeps("sleeper").unwrap(), sleeps_here().unwrap());
            (0..3).for_each(|_| std::thread::sleep(std::time::Duration::from_millis(2)));
            (sleeps("sleeper").unwrap() - before, sleeps_here().unwrap() - before_here)
        });
        let (counted, here) = counted.unwrap().join().unwrap();
        assert!((3..30).contains(&counted), "{counted} sleeps");
        assert!((3..30).contains(&here), "{here} sleeps");
    }
}
