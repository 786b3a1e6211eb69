//! What must hold at every step of every run.

use std::fmt;

/// A rule of the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// No byte lands in a page that is home, or under a grant from before it was last home.
    HomePages,
    /// Each accepted token ends in one `Done`, in order, or in its lane's `Down`, after which the lane is silent.
    Tokens,
    /// In a delivered room the landed bytes are those that were sent, and no other byte of its pages has changed.
    Bytes,
    /// A room ends by its side's deadline, with one turn of grace, and only once.
    Deadline,
    /// The ends of the two sides go together: nobody relies on a delivery that the other side did not see, and
    /// nobody blames a peer that has not ended.
    Pairs,
    /// The arrivals of a room fall only when another attempt begins.
    Arrivals,
    /// Nobody is accused of what nobody has done: honest peers do not misbehave, their bytes are right, their ports
    /// refuse nothing.
    Accused,
    /// Without faults, what can be delivered is, and an end on one side is known on the other soon.
    FairWeather,
    /// Pages that come home can be used, and none is lost.
    Pool,
    /// When the faults stop, every room ends, every page comes home, and nothing is left of the dead.
    Leftovers,
    /// A grant is given back once: by the time it comes again its name may be another's.
    Releases,
    /// The code's own assertions.
    Panics,
}

/// A rule was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub rule: Rule,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.what)
    }
}

/// What a step of the harness gives.
pub type Held = Result<(), Violation>;

/// Breaks a rule.
pub fn broken<T>(rule: Rule, what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation { rule, what: what.into() })
}
