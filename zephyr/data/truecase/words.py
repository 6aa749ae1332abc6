"""Word lists of the truecaser: what no statistics of single words can tell. All in lower case."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that begin a sentence far more often than they go on one behind a quotation.
STARTERS = _words(
    """
    the this these those it its he she they we you your our my there here if when while although however but so
    then what why how who where which can could would should do does did please also additionally furthermore
    moreover finally therefore thus for in on at by with from as after before during once i i'm i've i'll i'd
    it's that's let let's some many most each every all both a an
    """
)

# Words that go on a sentence behind a quotation that ends in ! or ?.
CONTINUES = _words(
    """
    is was are were has have had and or but nor to in on of for at by with from as than that which who whose
    it's can could will would should may might does did do said says asked replied cried shouted exclaimed
    whispered he she i they we answered added yelled muttered thought the a an you my our his her their all both
    each some one two another every
    """
)

# Words behind which an i is a numeral, an index or a letter.
BEFORE_NUMERAL = _words(
    """
    part type chapter phase war section stage level class act book volume title grade scene page figure table
    appendix article factor type-i letter vowel variable index integer iteration step for element row column ith
    axis node loop range character line bit item imaginary unit complex number
    """
)

# Words behind the pronoun.
I_VERBS = _words(
    """
    am was have had do did don't didn't can can't cannot could couldn't will won't would wouldn't should
    shouldn't may might must need want wanted like love think thought know knew believe feel felt hope guess
    mean see saw get got go went make made use used try tried work live just also really never always only still
    already ever actually currently recently often usually sometimes now find found say said tell told ask asked
    look give take keep wish wonder understand remember understood understand'd do't haven't hadn't wasn't ain't
    hate prefer agree heard hear write wrote read plan planned came come bought buy left learn learned started
    start run ran have'nt dont cant didnt wont havent shouldnt wouldnt couldnt
    """
)

# Frequent words of English.
ENGLISH = _words(
    """
    the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
    which one you were her all she there would their we him been has when who will more no if out so said what
    up its about into than them can only other new some could time these two may then do first any my now such
    like our over me even most made after also did many before must through back years where much your way down
    should because long each just those how too good very make world still own see men work here get both
    between being under never day same another know while last might us great old year off come since against go
    came right used take three don't it's i'm can't please confirm thanks thank hello hi hey yes okay ok write give want
    need help tell explain using use list create generate describe why does let's sure
    """
)

# Frequent words of the languages of Europe that are written in Latin letters.
FOREIGN = _words(
    """
    de la que el los las una un por con para es en del se lo como más pero su al est le les des une dans pour
    qui sur pas avec ce il sont nous vous je tu der die das und ist nicht ein eine einen mit von den dem auf für
    ich sie wir zu im sich auch het een van dat niet zijn voor met op aan di che non per sono della gli da nel
    alla com não uma os dos na em você och att som på är jag det inte er og ikke til af w nie się jest że czy
    jak mi ten
    """
)

# Words that go on a sentence behind a name with a mark of its own: Yahoo! is.
BEHIND_TITLE = _words(
    """
    is was are were has have had and or nor to of for at by with from as than which
    """
)

# Names by far in what the table was counted on, which are words of their own or are often written small.
NOT_NAMES = _words(
    """
    thrones superman interloper ken maria john mockingbird goo nana homo lancer wallflower phos echidna armoured
    decibels
    paleolithic triforce saiyan pad carol lee gen pitt arab punn sistem starfire watergate whiskerina ultimopolis
    aqal ascii ato cim dap pcs pmcs erp phd icompute icey jojo delphi mina evangelion rei maru clair comte penn
    chiang mai mo jerry jack grant rankine wes hastings papa tiger kai doi scp san los las santa del der von van
    rosetta danish swiss dutch turkey china java python ruby swift rust cuba
    colorado congress confederates federalist federalists god bible senate roman gothic titanic amazon apple
    windows google photoshop puck catholic democrat democrats republican republicans internet web polish
    hamburger champagne jersey panama bohemian platonic brussels venetian morocco arctic antarctic herculean
    guinea cologne celsius fahrenheit newton kelvin pascal tesla hertz watt ampere marines navy army mars venus
    earth sun moon saturn
    """
)

# Words whose other reading has capitals; their neighbours must be very sure.
DOUBTFUL = _words(
    """
    us am pm it who ok st may march will mark bill or aids so no led art pet pan
    """
)

# Words that a full stop follows in the middle of a sentence only; written without it.
NEVER_LAST = _words(
    """
    mr mrs ms dr prof st mt ft gen col lt sgt capt cmdr adm rev hon gov sen rep pres messrs mme mlle sr sra fr
    vs v cf e.g i.e eg ie viz approx ca fig figs eq eqs vol vols pp al op cit ibid resp incl excl esp est avg
    tel dept sp spp ssp subsp var univ assn bros asst assoc a.k.a aka w.r.t n.b
    """
)

# Words that a full stop follows in the middle of a sentence and at its end.
AMBIGUOUS = _words(
    """
    etc u.s u.k u.n e.u u.s.a d.c a.m p.m ph.d m.d b.a m.a b.s m.s m.b.a j.d b.c a.d b.c.e c.e a.i l.a n.y inc
    ltd co corp llc jr sr esq ave blvd rd hwy jan feb apr aug sept oct nov dec tues thurs oz lb lbs tsp tbsp yrs
    misc orig p.s no
    """
)

# Names that end in a mark.
EXCLAIMED = _words("yahoo jeopardy oklahoma airplane wham")

# Names of programs that are written in lower case at the start of a sentence too.
COMMANDS = _words(
    """
    npm npx pip pip3 sudo kubectl apt brew curl wget grep awk sed chmod mkdir ssh
    """
)

# Words in lower case within titles.
SMALL = _words(
    """
    a an the and or nor but of in on at to for by with from as vs
    """
)

# Prepositions go on behind an abbreviation as often as they begin a sentence.
SURE_STARTERS = STARTERS - _words("in for on at by with from as after before during once i'd a an when if")
FOREIGN -= ENGLISH

# What words are made with: a word that is no more than one of these away from a known one is no name.
ENDINGS = tuple(
    sorted(
        _words(
            """
            s es ed d ing er ers ly ness able ible al ally ic ity ies ied ization isation ise ize less ful y ism
            ist ists tion ment ments like
            """
        )
    )
)
BEGINNINGS = tuple(
    sorted(_words("un re non pre over under sub super anti multi micro bio inter mis dis self co ultra out"))
)

# Words of a clause: what is before a colon and holds one is no label.
CLAUSE = _words(
    """
    is are was were be there let's please confirm consider follow follows following i you we they he she it says said
    means mean include includes have has had do does did can could will would get this these that what here
    """
)
